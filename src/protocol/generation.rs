//! Which supabase-js a client is, as its first join shows.

use serde::{Deserialize, de::IgnoredAny};

use super::{message::Json, serializer::Serializer};

/// The generation of supabase-js whose joins look like a client's, by realtime-js' versions.
///
/// Source: observed of the published clients (`tests/js/generations.test.js`) and read in the
/// packages 2.9.5, 2.10.0, 2.11.0, 2.12.0, 2.80.0 and 2.81.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, strum::VariantArray, strum::IntoStaticStr)]
pub enum Generation {
    /// `config` has no `private`.
    #[strum(serialize = "2.0-2.9")]
    Oldest,
    /// It has, and presence cannot be switched off.
    #[strum(serialize = "2.10-2.11")]
    WithPrivate,
    /// `config.presence.enabled` is there: 2.12 to 2.90, and later ones that are told to speak V1.
    #[strum(serialize = "2.12+")]
    WithPresenceSwitch,
    /// The same in V2: 2.91 and later, and those from 2.81 that are told to.
    #[strum(serialize = "2.81+")]
    V2,
    /// None of these.
    #[strum(serialize = "other")]
    Other,
}

impl Generation {
    /// Returns the generation of the client that sends this payload of a `phx_join`.
    #[must_use]
    pub fn of(serializer: Serializer, join: &Json) -> Self {
        #[derive(Deserialize)]
        struct Join {
            config: Config,
        }
        #[derive(Deserialize)]
        struct Config {
            #[serde(rename = "broadcast")]
            _broadcast: Broadcast,
            presence: Presence,
            private: Option<IgnoredAny>,
        }
        /// Any object.
        #[derive(Deserialize)]
        struct Broadcast {}
        #[derive(Deserialize)]
        struct Presence {
            #[serde(default)]
            enabled: Option<IgnoredAny>,
        }
        let Ok(Join { config }) = serde_json::from_str(join.as_str()) else {
            return Self::Other;
        };
        let has_switch = config.presence.enabled.is_some();
        match (serializer, config.private.is_some(), has_switch) {
            (Serializer::V1, false, false) => Self::Oldest,
            (Serializer::V1, true, false) => Self::WithPrivate,
            (Serializer::V1, true, true) => Self::WithPresenceSwitch,
            (Serializer::V2, true, true) => Self::V2,
            (Serializer::V1, false, true) | (Serializer::V2, _, _) => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn a_generation_is_told_by_the_shape_of_its_joins() {
        let of = |serializer, config: Value| {
            Generation::of(serializer, &Json::from_value(&json!({ "config": config })))
        };
        let (v1, v2) = (Serializer::V1, Serializer::V2);
        let plain = json!({ "broadcast": {}, "presence": { "key": "" } });
        let private = json!({ "broadcast": {}, "presence": { "key": "" }, "private": false });
        let switch = json!({ "broadcast": {}, "presence": { "enabled": false }, "private": false });
        assert_eq!(of(v1, plain.clone()), Generation::Oldest);
        assert_eq!(of(v1, private.clone()), Generation::WithPrivate);
        assert_eq!(of(v1, switch.clone()), Generation::WithPresenceSwitch);
        assert_eq!(of(v2, switch), Generation::V2);
        for (serializer, config) in
            [(v2, plain), (v2, private), (v1, json!({})), (v1, json!("x")), (v1, json!(["x"]))]
        {
            assert_eq!(of(serializer, config), Generation::Other);
        }
        assert_eq!(Generation::of(v1, &Json::EMPTY), Generation::Other);
    }
}
