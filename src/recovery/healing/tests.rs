//! Tests of whom news concern, and what a suspect may be told.

use std::net::IpAddr;

use serde_json::{Value, json};
use tokio::time::advance;

use super::*;
use crate::{
    auth::{
        revocations::{Revocation, RevokedBy, Stored},
        sign::sign,
    },
    hub::OutboxBounds,
    protocol::serializer::Serializer,
    recovery::{SUSPECTS_PER_ADDRESS_MAX, Standing},
    secret::Secret,
    server::{Config, Gateway},
};

const SECRET: &str = "the-secret-of-these-tests-of-healing";

/// A gateway whose healing these tests drive by hand.
fn gateway() -> Arc<Gateway> {
    let mut config = Config::defaults();
    config.jwt_secret = Secret::from(SECRET);
    let admin = config.topic.iter_mut().find(|rule| &*rule.name == "admin").unwrap();
    admin.pattern.truncate(1);
    admin.listen = Some("admin_{eid}".parse().unwrap());
    admin.event = Some("changed".into());
    let gateway = Gateway::new(config).unwrap();
    gateway.recovery.set_answered(true);
    gateway
}

fn client(address: u32) -> ClientKey {
    ClientKey::new(IpAddr::from(address.to_be_bytes()).into(), "browser")
}

fn suspect_with(gateway: &Gateway, client: ClientKey, claims: &Value) -> Suspicion {
    let token = sign(&Secret::from(SECRET), claims).unwrap();
    let token = gateway.auth.verify_at(&token, unix_now()).unwrap();
    let outbox = Arc::new(Outbox::new(Serializer::V1, &OutboxBounds::new(1 << 20, usize::MAX)));
    gateway.recovery.healing.suspect(&outbox, &token, client, Instant::now(), HashSet::new())
}

fn suspect(gateway: &Gateway, client: ClientKey) -> Suspicion {
    suspect_with(gateway, client, &json!({ "role": "anon", "exp": unix_now() + 3600 }))
}

fn told(gateway: &Gateway) -> u64 {
    gateway.recovery.healing.metrics.heals_sent.get()
}

/// Who notifies must not wait for thousands of suspects.
#[tokio::test(start_paused = true)]
async fn news_wait_for_the_healers_own_task() {
    let gateway = gateway();
    let recovery = &gateway.recovery;
    let _suspicion = suspect(&gateway, client(1));
    recovery.lose(client(1), "cache_invalidate_AB1", None);
    advance(Duration::from_secs(60)).await;
    for _ in 0..3 {
        recovery.healing.news_of("AB1");
    }
    assert_eq!((told(&gateway), recovery.healing.named.lock().len()), (0, 1));
    recovery.healer().heal_named().await;
    assert_eq!((told(&gateway), recovery.healing.named.lock().len()), (1, 0));
}

/// A database role without rights can name thousands of events a second.
#[tokio::test(start_paused = true)]
async fn the_name_of_an_event_that_nobody_may_be_deaf_to_is_not_even_kept() {
    let gateway = gateway();
    let recovery = &gateway.recovery;
    recovery.lose(client(1), "cache_invalidate_AB1", None);
    recovery.healing.name_event("AB1");
    assert_eq!(recovery.healing.named.lock().len(), 0, "nobody is suspect");
    let _suspicion = suspect(&gateway, client(1));
    recovery.note_joined(client(2), "cache_invalidate_AB2");
    recovery.note_joined(client(2), "room");
    for eid in ["AB2", "AB3", "room", ""] {
        recovery.healing.name_event(eid);
    }
    assert_eq!(recovery.healing.named.lock().len(), 0);
    recovery.healing.name_event("AB1");
    assert_eq!(recovery.healing.named.lock().len(), 1);
}

/// Neither the other suspects nor the other topics, however many there are.
#[tokio::test(start_paused = true)]
async fn news_of_an_event_are_the_business_of_those_who_have_lost_it() {
    let gateway = gateway();
    let recovery = &gateway.recovery;
    let _suspicions: Vec<_> = (0..1000).map(|address| suspect(&gateway, client(address))).collect();
    for number in 0..60 {
        for address in 0..100 {
            recovery.lose(client(address), &format!("cache_invalidate_NO{number}"), None);
        }
    }
    for address in [7, 8] {
        recovery.lose(client(address), "cache_invalidate_AB1", None);
    }
    advance(Duration::from_secs(60)).await;
    let mut healer = recovery.healer();
    recovery.healing.news_of("AB1");
    healer.heal_named().await;
    // Each of the two records, and the suspect of each.
    assert_eq!((healer.pace.looks, told(&gateway)), (4, 2));
    // What others have joined is none of theirs before everybody may know it.
    recovery.note_joined(client(1), "cache_invalidate_AB2");
    recovery.healing.news_of("AB2");
    healer.heal_named().await;
    assert_eq!((healer.pace.looks, told(&gateway)), (4, 2));
    recovery.answered("AB2", Standing::Public);
    advance(Duration::from_secs(14)).await;
    recovery.healing.news_of("AB2");
    healer.heal_named().await;
    assert_eq!(told(&gateway), 1002);
    // And not again within so long.
    recovery.healing.news_of("AB2");
    healer.heal_named().await;
    assert_eq!(told(&gateway), 1002);
}

#[tokio::test(start_paused = true)]
async fn of_an_address_so_many_sockets_are_suspect_and_the_first_ones_give_way() {
    let gateway = gateway();
    let recovery = &gateway.recovery;
    let ours = client(1);
    let mut suspicions: Vec<_> =
        (0..=SUSPECTS_PER_ADDRESS_MAX).map(|_| suspect(&gateway, ours)).collect();
    let other = ClientKey::new(IpAddr::from([0, 0, 0, 1]).into(), "another browser");
    suspicions.push(suspect(&gateway, other));
    let ours_left = || recovery.healing.suspects.of_record(ours.record()).len();
    assert_eq!(ours_left(), SUSPECTS_PER_ADDRESS_MAX - 1);
    suspicions.push(suspect(&gateway, client(2)));
    assert_eq!(ours_left(), SUSPECTS_PER_ADDRESS_MAX - 1);
    // The last of all are still there, those of the first two places are not.
    suspicions.truncate(2);
    assert!(recovery.healing.suspects.is_empty());
    drop(suspicions);
    assert!(recovery.healing.suspects.is_empty());
    assert_eq!(recovery.healing.suspects.next(), None);
}

/// A token's end counts for what its socket is told, too; who is signed out may still be a viewer.
#[tokio::test(start_paused = true)]
async fn a_suspect_whose_token_has_ended_is_told_what_anybody_may_read() {
    let gateway = gateway();
    let recovery = &gateway.recovery;
    let claims = json!({
        "role": "authenticated", "sub": "s", "session_id": "x", "exp": unix_now() + 3600,
        "admin_events": { "AB1": "voting" },
    });
    let _suspicion = suspect_with(&gateway, client(1), &claims);
    for topic in ["admin-auction-AB1", "cache_invalidate_AB1"] {
        recovery.lose(client(1), topic, None);
    }
    let mut healer = recovery.healer();
    advance(Duration::from_secs(5)).await;
    healer.heal_due().await;
    assert_eq!(told(&gateway), 2);
    let now = unix_now();
    let revocation =
        Revocation { by: RevokedBy::SessionId, value: "x".into(), at: now, until: now + 3600 };
    gateway.auth.revocations.revoke(revocation, Stored::No, now).unwrap();
    advance(Duration::from_secs(15)).await;
    healer.heal_due().await;
    assert_eq!(told(&gateway), 3);
    recovery.healing.news_of("AB1");
    advance(Duration::from_secs(15)).await;
    healer.heal_named().await;
    assert_eq!(told(&gateway), 4);
}
