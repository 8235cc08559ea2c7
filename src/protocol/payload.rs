//! Typed payloads: what a join asks for, and the payloads that the server writes.
//!
//! Invariants: a [`JoinConfig`] that exists is right; fields that are absent or unreadable have
//! the reference server's defaults, except `private`, which fails closed. A client's JSON is read
//! into the fields that are named here; what they hold stays text, and no tree is made of it.

use std::{borrow::Cow, collections::BTreeMap, fmt::Write};

use serde::{Deserialize, Deserializer};
use serde_json::{json, value::RawValue};

use super::{
    error_code::{ErrorCode, Refusal},
    message::{Json, write_json_string},
    topic::Privacy,
};

/// Most `postgres_changes` bindings of one join; further ones are ignored.
const BINDINGS_MAX: usize = 100;

/// How publishable and secret keys begin: they are not JWTs, and inside the protocol they stand
/// for the connection's token.
pub(crate) const OPAQUE_KEY_PREFIX: &str = "sb_";

/// `{"status":"ok","response":{}}`
pub(crate) const OK: &str = r#"{"status":"ok","response":{}}"#;

/// A reply to a broadcast above the payload limit, as the reference server words it.
pub(crate) const PAYLOAD_TOO_LARGE: &str =
    r#"{"status":"error","response":"payload_size_exceeded"}"#;

/// What a `phx_join` asks for.
#[derive(Debug, Clone, PartialEq)]
pub struct JoinConfig {
    /// `config.private`.
    pub privacy: Privacy,
    /// `config.broadcast.ack`: the sender wants a reply to each broadcast.
    pub ack: bool,
    /// `config.broadcast.self`: the sender wants its own broadcasts.
    pub to_self: bool,
    /// `config.broadcast.replay`: the client wants what was sent before, on a private channel.
    pub replay: bool,
    /// Whether the client waits for a `presence_state`.
    pub presence: bool,
    /// `config.postgres_changes` as the reply repeats them, a JSON array in which each has an `id`;
    /// `None` if there is none.
    pub bindings: Option<Box<str>>,
    /// `access_token` or `user_token`; absent means the connection's.
    pub token: Option<Box<str>>,
}

impl JoinConfig {
    /// Reads the payload of a `phx_join` to `sub_topic`.
    ///
    /// Shape: `{"config":{"private":bool,"broadcast":{"ack":bool,"self":bool},
    /// "presence":{"key":…,"enabled":bool},"postgres_changes":[…]},"access_token":"…"}`, all of it
    /// optional. Without `config` the payload is of the first client library, whose topics name a
    /// table: `realtime:<schema>:<table>:<filter>`.
    ///
    /// # Errors
    /// [`Refusal`] if the payload or `config` is not an object, if `private` is there and is not
    /// a boolean, or if a public channel asks for replay.
    ///
    /// Source: supabase/realtime `realtime_channel.ex` and `join_payload.ex` @833cf36.
    pub fn parse(payload: &Json, sub_topic: &str, presence_default: bool) -> Result<Self, Refusal> {
        let Some(payload) = object::<JoinFields<'_>>(payload.as_str()) else {
            return Err(Refusal::new(ErrorCode::UnknownErrorOnChannel));
        };
        let token = payload.token().map(Into::into);
        let Some(config) = payload.config else {
            return Ok(Self {
                privacy: Privacy::Public,
                ack: false,
                to_self: false,
                replay: false,
                presence: false,
                bindings: list(std::iter::once(first_library_binding(sub_topic))),
                token,
            });
        };
        let Some(config) = object::<ConfigFields<'_>>(config.get()) else {
            return Err(Refusal::with_detail(
                ErrorCode::UnknownErrorOnChannel,
                "expected config to be an object",
            ));
        };
        let privacy = match config.private {
            None => Privacy::Public,
            Some(value) if value.get() == "null" => Privacy::Public,
            Some(value) => match flexible_bool(value) {
                Some(true) => Privacy::Private,
                Some(false) => Privacy::Public,
                None => return Err(Refusal::new(ErrorCode::InvalidJoinPayload)),
            },
        };
        let broadcast =
            config.broadcast.and_then(|value| object::<BroadcastFields<'_>>(value.get()));
        let broadcast = broadcast.unwrap_or_default();
        if privacy == Privacy::Public && broadcast.replay.is_some() {
            return Err(Refusal::new(ErrorCode::UnableToReplayMessages));
        }
        let flag = |value: Option<&RawValue>| value.and_then(flexible_bool).unwrap_or(false);
        let presence = config.presence.and_then(|value| object::<PresenceFields<'_>>(value.get()));
        let presence = presence.is_some_and(|presence| {
            presence.enabled.and_then(flexible_bool).unwrap_or(presence_default)
        });
        let bindings = config
            .postgres_changes
            .and_then(|list| serde_json::from_str::<Vec<&RawValue>>(list.get()).ok());
        let bindings = bindings.unwrap_or_default();
        let bindings = bindings.iter().filter_map(|value| binding(value));
        Ok(Self {
            privacy,
            ack: flag(broadcast.ack),
            to_self: flag(broadcast.to_self),
            replay: broadcast.replay.is_some_and(|replay| replay.get().starts_with('{')),
            presence,
            bindings: list(bindings.take(BINDINGS_MAX)),
            token,
        })
    }

    /// The payload of the reply: `{"status":"ok","response":{"postgres_changes":[…]}}`.
    pub(crate) fn reply(&self) -> String {
        let bindings = self.bindings.as_deref().unwrap_or("[]");
        format!(r#"{{"status":"ok","response":{{"postgres_changes":{bindings}}}}}"#)
    }
}

/// Returns the token of an `access_token` event: the text of the field of this name.
///
/// # Errors
/// [`NotText`] if the field is there and is neither a text nor null.
pub(crate) fn access_token(payload: &Json) -> Result<Option<String>, NotText> {
    let payload = object::<JoinFields<'_>>(payload.as_str());
    match payload.and_then(|payload| payload.access_token) {
        None => Ok(None),
        Some(value) if value.get() == "null" => Ok(None),
        Some(value) => text(value).map(Some).ok_or(NotText),
    }
}

/// A token that is no text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotText;

/// The fields of a join's payload that are read; a field with null is there.
#[derive(Deserialize)]
struct JoinFields<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    config: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    access_token: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    user_token: Option<&'a RawValue>,
}

impl JoinFields<'_> {
    /// Returns the channel's own token, or `None` if an opaque key asks for the connection's token.
    fn token(&self) -> Option<String> {
        let access_token = self.access_token.and_then(text);
        let user_token = self.user_token.and_then(text);
        if access_token.as_ref().or(user_token.as_ref())?.starts_with(OPAQUE_KEY_PREFIX) {
            return None;
        }
        user_token.or(access_token)
    }
}

/// The fields of `config`.
#[derive(Deserialize)]
struct ConfigFields<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    private: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    broadcast: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    presence: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    postgres_changes: Option<&'a RawValue>,
}

/// The fields of `config.broadcast`.
#[derive(Default, Deserialize)]
struct BroadcastFields<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    ack: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present", rename = "self")]
    to_self: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    replay: Option<&'a RawValue>,
}

/// The fields of `config.presence`.
#[derive(Deserialize)]
struct PresenceFields<'a> {
    #[serde(borrow, default, deserialize_with = "present")]
    enabled: Option<&'a RawValue>,
}

/// A field that is there, whatever it holds: an `Option` alone takes null for its absence.
fn present<'de: 'a, 'a, D>(deserializer: D) -> Result<Option<&'a RawValue>, D::Error>
where
    D: Deserializer<'de>,
{
    <&RawValue>::deserialize(deserializer).map(Some)
}

/// Reads a JSON object; a derived reader alone would take an array of the fields, too.
fn object<'a, T: Deserialize<'a>>(json: &'a str) -> Option<T> {
    json.trim_start().starts_with('{').then(|| serde_json::from_str(json).ok()).flatten()
}

/// The text of a JSON string.
fn text(value: &RawValue) -> Option<String> {
    serde_json::from_str(value.get()).ok()
}

/// The payload of a `system` push:
/// `{"message":"…","status":"error","extension":"system","channel":"<sub>"}`.
pub(crate) fn system_error(extension: &str, message: &str, sub_topic: &str) -> Json {
    Json::from_value(&json!({
        "message": message, "status": "error", "extension": extension, "channel": sub_topic,
    }))
}

/// JSON booleans, and the strings `true` and `false` in any case.
fn flexible_bool(value: &RawValue) -> Option<bool> {
    let text = text(value).map(|text| text.to_ascii_lowercase());
    match text.as_deref().unwrap_or(value.get()) {
        "true" => Some(true),
        "false" => Some(false),
        _ => None,
    }
}

/// A binding of Postgres changes: its fields by name, each as JSON.
type Binding<'a> = BTreeMap<String, Cow<'a, str>>;

/// Reads a binding, if the value is an object.
fn binding(value: &RawValue) -> Option<Binding<'_>> {
    let fields = object::<BTreeMap<String, &RawValue>>(value.get())?;
    Some(fields.into_iter().map(|(name, value)| (name, value.get().into())).collect())
}

/// `<schema>:<table>:<filter>`, the last two optional.
fn first_library_binding(sub_topic: &str) -> Binding<'static> {
    let json = |text: &str| {
        let mut json = String::new();
        write_json_string(&mut json, text);
        json.into()
    };
    ["schema", "table", "filter"]
        .into_iter()
        .zip(sub_topic.splitn(3, ':'))
        .map(|(key, part)| (key.into(), json(part)))
        .collect()
}

/// Writes bindings as a JSON array; returns `None` for no binding.
fn list<'a>(bindings: impl Iterator<Item = Binding<'a>>) -> Option<Box<str>> {
    let bindings: Vec<_> = bindings.map(|binding| with_id(&binding)).collect();
    (!bindings.is_empty()).then(|| format!("[{}]", bindings.join(",")).into())
}

/// The binding without its nulls and with an `id`: a positive integer below 2^27, the same for
/// the same binding. Clients compare the other keys with what they sent, strictly.
fn with_id(binding: &Binding<'_>) -> String {
    let mut out = String::new();
    for (key, value) in binding {
        if key != "id" && value != "null" {
            out.push(if out.is_empty() { '{' } else { ',' });
            write_json_string(&mut out, key);
            out.push(':');
            out.push_str(value);
        }
    }
    // FNV-1a over the text: the map keeps its keys sorted.
    let hash = out.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let id = ((hash ^ (hash >> 27) ^ (hash >> 54)) & ((1 << 27) - 1)).max(1);
    out.push(if out.is_empty() { '{' } else { ',' });
    let _ = write!(out, "\"id\":{id}}}"); // A `String` takes everything.
    out
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parse(payload: &Value) -> Result<JoinConfig, Refusal> {
        JoinConfig::parse(&Json::from_value(payload), "room", true)
    }

    #[test]
    fn an_empty_config_has_the_reference_servers_defaults() {
        let config = parse(&json!({ "config": {} })).unwrap();
        assert_eq!(config.privacy, Privacy::Public);
        assert!(!config.ack && !config.to_self && !config.presence);
        assert!(config.bindings.is_none() && config.token.is_none());
    }

    #[test]
    fn private_fails_closed_unless_it_can_be_read() {
        let privacy = |value: Value| parse(&json!({ "config": { "private": value } }));
        assert_eq!(privacy(json!("TRUE")).unwrap().privacy, Privacy::Private);
        assert_eq!(privacy(json!("false")).unwrap().privacy, Privacy::Public);
        assert_eq!(privacy(json!("yes")).unwrap_err().code, ErrorCode::InvalidJoinPayload);
        assert_eq!(privacy(json!(1)).unwrap_err().code, ErrorCode::InvalidJoinPayload);
    }

    #[test]
    fn old_clients_that_send_a_presence_key_wait_for_a_state() {
        let presence = |value: Value| parse(&json!({ "config": { "presence": value } })).unwrap();
        assert!(presence(json!({ "key": "" })).presence);
        assert!(!presence(json!({ "key": "", "enabled": false })).presence);
        assert!(presence(json!({ "enabled": "true" })).presence);
        assert!(!presence(json!("x")).presence);
    }

    #[test]
    fn a_binding_is_echoed_as_sent_with_a_stable_id_and_without_nulls() {
        let config = parse(&json!({ "config": { "postgres_changes": [
            { "event": "*", "schema": "public", "table": "art", "filter": null }, null, "x",
            { "event": "*", "schema": "public", "table": "art" },
        ] } }))
        .unwrap();
        let bindings: Vec<Value> = serde_json::from_str(&config.bindings.unwrap()).unwrap();
        let [first, second] = bindings.as_slice() else { panic!("two bindings") };
        assert_eq!(first, second);
        assert!(first["id"].as_u64().is_some_and(|id| (1..1 << 27).contains(&id)));
        assert_eq!(first.as_object().unwrap().len(), 4);
    }

    #[test]
    fn a_hundred_bindings_are_repeated_as_they_came_and_further_ones_are_not() {
        let one = r#"{"table":"\u0061", "schema":"s","filter":null,"id":"mine","x":[1e2,{"y":1}]}"#;
        let list = vec![one; BINDINGS_MAX + 1].join(",");
        let payload = format!(r#"{{"config":{{"postgres_changes":[1,{list}]}}}}"#);
        let config = JoinConfig::parse(&Json::parse(payload.into()).unwrap(), "room", true);
        let reply = config.unwrap().reply();
        let head = r#"{"status":"ok","response":{"postgres_changes":["#;
        let binding = r#"{"schema":"s","table":"\u0061","x":[1e2,{"y":1}],"id":"#;
        assert!(reply.starts_with(&format!("{head}{binding}")), "{reply}");
        assert_eq!(reply.matches(binding).count(), BINDINGS_MAX);
        assert!(Json::parse(reply.into()).is_ok());
        let empty = parse(&json!({ "config": { "postgres_changes": [{}] } })).unwrap();
        assert!(empty.reply().contains(r#"[{"id":"#));
    }

    #[test]
    fn the_first_library_binds_the_table_that_its_topic_names() {
        let config = JoinConfig::parse(&Json::EMPTY, "public:art:id=eq.\"1\"", true).unwrap();
        let bindings: Vec<Value> = serde_json::from_str(&config.bindings.unwrap()).unwrap();
        let [binding] = bindings.as_slice() else { panic!("one binding") };
        assert_eq!(binding["schema"], "public");
        assert_eq!(binding["table"], "art");
        assert_eq!(binding["filter"], "id=eq.\"1\"");
        assert!(binding["id"].is_u64());
    }

    #[test]
    fn a_token_of_an_event_is_a_text_or_absent() {
        let token = |payload: Value| access_token(&Json::from_value(&payload));
        assert_eq!(token(json!({ "access_token": "a\"b" })), Ok(Some("a\"b".into())));
        for absent in [json!({}), json!({ "access_token": null }), json!([]), json!(1)] {
            assert_eq!(token(absent), Ok(None));
        }
        assert_eq!(token(json!({ "access_token": 7 })), Err(NotText));
    }

    #[test]
    fn the_users_token_goes_before_the_keys() {
        let config =
            parse(&json!({ "access_token": "a", "user_token": "u", "config": {} })).unwrap();
        assert_eq!(config.token.as_deref(), Some("u"));
        let config = parse(&json!({ "access_token": "a", "user_token": null })).unwrap();
        assert_eq!(config.token.as_deref(), Some("a"));
        let config = parse(&json!({ "access_token": "sb_x", "user_token": "u" })).unwrap();
        assert_eq!(config.token, None);
    }
}
