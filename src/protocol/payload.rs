//! Typed payloads: what a join asks for, and the payloads that the server writes.
//!
//! Invariants: a [`JoinConfig`] that exists is right; fields that are absent or unreadable have
//! the reference server's defaults, except `private`, which fails closed.

use serde_json::{Map, Value, json};

use super::{
    error_code::{ErrorCode, Refusal},
    message::Json,
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
    /// `config.postgres_changes`, each with the `id` that the reply gives it.
    pub bindings: Vec<Map<String, Value>>,
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
        let not_an_object = || Refusal::new(ErrorCode::UnknownErrorOnChannel);
        let Ok(Value::Object(mut payload)) = serde_json::from_str(payload.as_str()) else {
            return Err(not_an_object());
        };
        let token = join_token(&payload).map(Into::into);
        let config = match payload.remove("config") {
            None => {
                return Ok(Self {
                    privacy: Privacy::Public,
                    ack: false,
                    to_self: false,
                    replay: false,
                    presence: false,
                    bindings: vec![with_id(first_library_binding(sub_topic))],
                    token,
                });
            }
            Some(Value::Object(config)) => config,
            Some(_) => {
                return Err(Refusal::with_detail(
                    ErrorCode::UnknownErrorOnChannel,
                    "expected config to be an object",
                ));
            }
        };
        let privacy = match config.get("private") {
            None | Some(Value::Null) => Privacy::Public,
            Some(value) => match flexible_bool(value) {
                Some(true) => Privacy::Private,
                Some(false) => Privacy::Public,
                None => return Err(Refusal::new(ErrorCode::InvalidJoinPayload)),
            },
        };
        let broadcast = config.get("broadcast").and_then(Value::as_object);
        if privacy == Privacy::Public
            && broadcast.is_some_and(|fields| fields.contains_key("replay"))
        {
            return Err(Refusal::new(ErrorCode::UnableToReplayMessages));
        }
        let flag =
            |key| broadcast.and_then(|fields| flexible_bool(fields.get(key)?)).unwrap_or(false);
        let presence = config.get("presence").and_then(Value::as_object).is_some_and(|presence| {
            presence.get("enabled").and_then(flexible_bool).unwrap_or(presence_default)
        });
        let bindings = match config.get("postgres_changes") {
            Some(Value::Array(bindings)) => bindings
                .iter()
                .filter_map(Value::as_object)
                .take(BINDINGS_MAX)
                .map(|binding| with_id(binding.clone()))
                .collect(),
            _ => Vec::new(),
        };
        let replay =
            broadcast.and_then(|fields| fields.get("replay")).is_some_and(Value::is_object);
        let (ack, to_self) = (flag("ack"), flag("self"));
        Ok(Self { privacy, ack, to_self, replay, presence, bindings, token })
    }

    /// The payload of the reply: `{"status":"ok","response":{"postgres_changes":[…]}}`.
    pub(crate) fn reply(&self) -> Json {
        Json::from_value(
            &json!({ "status": "ok", "response": { "postgres_changes": self.bindings } }),
        )
    }
}

/// The payload of a `system` push:
/// `{"message":"…","status":"error","extension":"system","channel":"<sub>"}`.
pub(crate) fn system_error(extension: &str, message: &str, sub_topic: &str) -> Json {
    Json::from_value(&json!({
        "message": message, "status": "error", "extension": extension, "channel": sub_topic,
    }))
}

/// Returns the channel's own token, or `None` if an opaque key asks for the connection's token.
fn join_token(payload: &Map<String, Value>) -> Option<&str> {
    let access_token = payload.get("access_token").and_then(Value::as_str);
    let user_token = payload.get("user_token").and_then(Value::as_str);
    if access_token.or(user_token)?.starts_with(OPAQUE_KEY_PREFIX) {
        return None;
    }
    user_token.or(access_token)
}

/// JSON booleans, and the strings `true` and `false` in any case.
fn flexible_bool(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(value) => Some(*value),
        Value::String(text) if text.eq_ignore_ascii_case("true") => Some(true),
        Value::String(text) if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

/// `<schema>:<table>:<filter>`, the last two optional.
fn first_library_binding(sub_topic: &str) -> Map<String, Value> {
    ["schema", "table", "filter"]
        .into_iter()
        .zip(sub_topic.splitn(3, ':'))
        .map(|(key, part)| (key.to_owned(), part.into()))
        .collect()
}

/// The binding without its nulls and with an `id`: a positive integer below 2^27, the same for
/// the same binding. Clients compare the other keys with what they sent, strictly.
fn with_id(mut binding: Map<String, Value>) -> Map<String, Value> {
    binding.remove("id");
    binding.retain(|_, value| !value.is_null());
    // FNV-1a over the canonical text: `Map` keeps its keys sorted.
    let text = Value::Object(binding.clone()).to_string();
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let id = (hash ^ (hash >> 27) ^ (hash >> 54)) & ((1 << 27) - 1);
    binding.insert("id".to_owned(), id.max(1).into());
    binding
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(payload: &Value) -> Result<JoinConfig, Refusal> {
        JoinConfig::parse(&Json::from_value(payload), "room", true)
    }

    #[test]
    fn an_empty_config_has_the_reference_servers_defaults() {
        let config = parse(&json!({ "config": {} })).unwrap();
        assert_eq!(config.privacy, Privacy::Public);
        assert!(!config.ack && !config.to_self && !config.presence);
        assert!(config.bindings.is_empty() && config.token.is_none());
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
        let [first, second] = config.bindings.as_slice() else { panic!("two bindings") };
        assert_eq!(first, second);
        assert!(first["id"].as_u64().is_some_and(|id| (1..1 << 27).contains(&id)));
        assert_eq!(first.len(), 4);
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
