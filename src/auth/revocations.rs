//! Revocations of valid tokens, by subject, by session or by token.
//!
//! Invariants: the list is bounded, and a full one refuses a further revocation rather than drop
//! another; an entry is dropped when its time is over, and not before; a check takes no lock while
//! the list is empty.

use std::{
    collections::HashMap,
    sync::atomic::{AtomicUsize, Ordering},
};

use parking_lot::RwLock;
use strum::{IntoStaticStr, VariantArray};
use tokio::sync::Notify;

use super::claims::Claims;

/// Longest value of a claim that can be revoked, in bytes.
pub const VALUE_BYTES_MAX: usize = 128;

/// The claim by which tokens are revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, VariantArray, IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum RevokedBy {
    /// `sub`: the tokens of a person that were issued until the revocation, so that those of a later
    /// sign-in are valid.
    Sub,
    /// `session_id`: every token of a session, past or future.
    SessionId,
    /// `jti`: one token.
    Jti,
}

impl RevokedBy {
    /// The claim's name.
    #[must_use]
    pub fn claim(self) -> &'static str {
        self.into()
    }

    /// Returns the claim of this name.
    #[must_use]
    pub fn named(claim: &str) -> Option<Self> {
        Self::VARIANTS.iter().copied().find(|by| by.claim() == claim)
    }
}

/// One revocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// The claim.
    pub by: RevokedBy,
    /// The claim's value.
    pub value: Box<str>,
    /// The time of the revocation, in seconds since 1970.
    pub at: i64,
    /// The end of the revocation, in seconds since 1970.
    pub until: i64,
}

/// The list has no room for another revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for another revocation: see auth.revocations_max")]
pub struct Full;

/// The revocations in force.
#[derive(Debug)]
pub struct Revocations {
    entries: RwLock<Entries>,
    /// The number of entries, which a check reads before it takes the lock.
    count: AtomicUsize,
    max: usize,
    /// Notified when the database's revocations may have changed.
    stale: Notify,
}

type Entries = HashMap<RevokedBy, HashMap<Box<str>, Entry>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    at: i64,
    until: i64,
    /// Until this time, in seconds since 1970, the entry stays even if the database lacks it.
    kept: i64,
}

/// Whether the database has stored a revocation of this gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// The database has stored it. For [`STALE`] seconds an older reading may still arrive.
    Yes,
    /// The database has not stored it, so that no other gateway has it.
    No,
}

/// How long a reading that is older than a stored revocation may still arrive, in seconds.
const STALE: i64 = 10;

impl Revocations {
    /// Creates an empty list with room for `max` revocations.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self { entries: RwLock::default(), count: AtomicUsize::new(0), max, stale: Notify::new() }
    }

    /// Returns how many revocations have room: `auth.revocations_max`.
    #[must_use]
    pub fn max(&self) -> usize {
        self.max
    }

    /// Records that the database's revocations may have changed, which ends [`Self::stale`].
    pub(crate) fn mark_stale(&self) {
        self.stale.notify_one();
    }

    /// Waits until the database's revocations may have changed. Returns at once if they were marked
    /// while nobody was waiting.
    ///
    /// # Cancel safety
    /// Cancel-safe: a mark that no caller has seen is kept.
    pub(crate) async fn stale(&self) {
        self.stale.notified().await;
    }

    /// Adds a revocation, or takes it back if its time is over at `now`.
    ///
    /// # Errors
    /// [`Full`] if there is no room even after dropping those that are over at `now`.
    pub fn revoke(&self, revocation: Revocation, stored: Stored, now: i64) -> Result<(), Full> {
        let mut entries = self.entries.write();
        let Revocation { by, value, at, until } = revocation;
        let kept = match stored {
            Stored::Yes => now.saturating_add(STALE),
            Stored::No => until,
        };
        if until <= now {
            if let Some(values) = entries.get_mut(&by) {
                values.remove(&value);
            }
        } else {
            let is_known = entries.get(&by).is_some_and(|values| values.contains_key(&value));
            if !is_known && count(&entries) >= self.max {
                forget(&mut entries, now);
                if count(&entries) >= self.max {
                    return Err(Full);
                }
            }
            entries.entry(by).or_default().insert(value, Entry { at, until, kept });
        }
        self.count.store(count(&entries), Ordering::Release);
        Ok(())
    }

    /// Replaces the list by the first `max` revocations of the database. Entries of this gateway that
    /// the database cannot have yet are kept. Returns whether anything has changed.
    pub fn replace(&self, revocations: impl Iterator<Item = Revocation>, now: i64) -> bool {
        let mut new = Entries::new();
        for Revocation { by, value, at, until } in revocations.take(self.max) {
            new.entry(by).or_default().insert(value, Entry { at, until, kept: 0 });
        }
        let mut entries = self.entries.write();
        for (by, values) in &*entries {
            for (value, entry) in values.iter().filter(|(_, entry)| now < entry.kept) {
                new.entry(*by).or_default().insert(value.clone(), *entry);
            }
        }
        let has_changed = !is_same(&entries, &new);
        self.count.store(count(&new), Ordering::Release);
        *entries = new;
        has_changed
    }

    /// Returns whether a token with these claims is revoked at `now`, in seconds since 1970.
    #[must_use]
    pub fn is_revoked(&self, claims: &Claims, now: i64) -> bool {
        if self.count.load(Ordering::Acquire) == 0 {
            return false;
        }
        let entries = self.entries.read();
        RevokedBy::VARIANTS.iter().any(|by| {
            let value = claims.text_at(std::iter::once(by.claim().to_owned()));
            let found = value.and_then(|value| entries.get(by)?.get(value));
            found.is_some_and(|Entry { at, until, .. }| {
                let is_later = *by == RevokedBy::Sub && claims.iat().is_some_and(|iat| iat > *at);
                now < *until && !is_later
            })
        })
    }

    /// Returns the number of entries, with those that are over and have not been dropped yet.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Drops the entries that are over at `now`.
    pub fn sweep(&self, now: i64) {
        let mut entries = self.entries.write();
        forget(&mut entries, now);
        self.count.store(count(&entries), Ordering::Release);
    }
}

/// Whether both lists revoke the same.
fn is_same(some: &Entries, others: &Entries) -> bool {
    let all = some.iter().flat_map(|(by, values)| values.iter().map(move |entry| (*by, entry)));
    count(some) == count(others)
        && all.into_iter().all(|(by, (value, entry))| {
            let other = others.get(&by).and_then(|values| values.get(value));
            other.is_some_and(|other| (other.at, other.until) == (entry.at, entry.until))
        })
}

fn count(entries: &Entries) -> usize {
    entries.values().map(HashMap::len).sum()
}

fn forget(entries: &mut Entries, now: i64) {
    for values in entries.values_mut() {
        values.retain(|_, entry| now < entry.until);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn claims(value: &Value) -> Claims {
        let mut fields = value.as_object().unwrap().clone();
        fields.insert("role".to_owned(), "authenticated".into());
        fields.insert("exp".to_owned(), (NOW + 3600).into());
        Claims::try_from(fields).unwrap()
    }

    fn of(by: RevokedBy, value: &str) -> Revocation {
        Revocation { by, value: value.into(), at: NOW, until: NOW + 60 }
    }

    #[test]
    fn a_subjects_later_sign_in_holds_and_a_session_stays_ended() {
        let list = Revocations::new(10);
        list.revoke(of(RevokedBy::Sub, "u"), Stored::Yes, NOW).unwrap();
        list.revoke(of(RevokedBy::SessionId, "s"), Stored::Yes, NOW).unwrap();
        list.revoke(of(RevokedBy::Jti, "j"), Stored::Yes, NOW).unwrap();
        for (fields, is_revoked) in [
            (json!({ "sub": "u", "iat": NOW }), true),
            (json!({ "sub": "u", "iat": NOW - 1 }), true),
            (json!({ "sub": "u", "iat": NOW as f64 + 0.9 }), true),
            // The token does not say when it was issued.
            (json!({ "sub": "u" }), true),
            (json!({ "sub": "u", "iat": NOW + 1 }), false),
            (json!({ "session_id": "s", "iat": NOW + 1 }), true),
            (json!({ "jti": "j", "iat": NOW + 1 }), true),
            (json!({ "sub": "s", "session_id": "j", "jti": "u" }), false),
            (json!({ "sub": ["u"] }), false),
            (json!({}), false),
        ] {
            assert_eq!(list.is_revoked(&claims(&fields), NOW), is_revoked, "{fields}");
        }
    }

    #[test]
    fn a_revocation_holds_until_its_second_and_can_be_taken_back() {
        let list = Revocations::new(10);
        let user = claims(&json!({ "sub": "u" }));
        list.revoke(of(RevokedBy::Sub, "u"), Stored::Yes, NOW).unwrap();
        assert!(list.is_revoked(&user, NOW + 59));
        assert!(!list.is_revoked(&user, NOW + 60));
        list.revoke(Revocation { until: NOW, ..of(RevokedBy::Sub, "u") }, Stored::Yes, NOW)
            .unwrap();
        assert!(!list.is_revoked(&user, NOW));
        assert_eq!(list.count(), 0);
    }

    /// Dropping an entry for another one would make a revoked token valid again.
    #[test]
    fn a_full_list_refuses_until_the_time_of_one_is_over() {
        let list = Revocations::new(2);
        list.revoke(of(RevokedBy::Sub, "a"), Stored::Yes, NOW).unwrap();
        list.revoke(Revocation { until: NOW + 9, ..of(RevokedBy::Jti, "b") }, Stored::Yes, NOW)
            .unwrap();
        assert_eq!(list.revoke(of(RevokedBy::Sub, "c"), Stored::Yes, NOW), Err(Full));
        list.revoke(of(RevokedBy::Sub, "a"), Stored::Yes, NOW).unwrap();
        list.revoke(of(RevokedBy::Sub, "c"), Stored::Yes, NOW + 9).unwrap();
        assert_eq!(list.count(), 2);
        list.sweep(NOW + 60);
        assert_eq!(list.count(), 0);
    }

    #[test]
    fn what_the_database_has_takes_the_place_of_what_it_should_have() {
        let list = Revocations::new(2);
        let both = [of(RevokedBy::Sub, "a"), of(RevokedBy::Sub, "b"), of(RevokedBy::Sub, "beyond")];
        assert!(list.replace(both.clone().into_iter(), NOW));
        assert!(!list.replace(both.into_iter(), NOW));
        assert_eq!(list.count(), 2);
        assert!(list.replace(std::iter::empty(), NOW));
        assert_eq!(list.count(), 0);
    }

    /// A reading that began before a revocation was stored must not undo it, and a revocation that
    /// could not be stored is in force all the same.
    #[test]
    fn what_was_revoked_here_outlives_a_reading_that_does_not_know_of_it() {
        let list = Revocations::new(2);
        list.revoke(of(RevokedBy::Sub, "stored"), Stored::Yes, NOW).unwrap();
        list.revoke(of(RevokedBy::Sub, "only here"), Stored::No, NOW).unwrap();
        assert!(!list.replace(std::iter::empty(), NOW));
        assert!(list.replace(std::iter::empty(), NOW + STALE));
        assert!(list.is_revoked(&claims(&json!({ "sub": "only here" })), NOW + STALE));
        assert!(!list.is_revoked(&claims(&json!({ "sub": "stored" })), NOW + STALE));
    }
}
