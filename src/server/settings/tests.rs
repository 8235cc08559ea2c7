//! What is read, refused and printed of the settings.

use std::time::Duration;

use figment::{
    Figment,
    providers::{Format, Toml},
};

use super::{show::hide_password, *};

fn load(variables: &[(&str, &str)]) -> Result<(Config, Effective), ConfigError> {
    let owned = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Config::load(None, owned)
}

#[test]
fn the_built_in_settings_are_right() {
    assert!(load(&[]).is_ok());
}

#[test]
fn a_variable_goes_over_the_file_and_keeps_a_secret_of_digits_a_text() {
    let (config, _) = load(&[
        ("TIDEGATE_JWT_SECRET", "12345"),
        ("TIDEGATE_LIMITS__CONNECTIONS_MAX", "7"),
        ("DATABASE_URL", "postgres://a"),
        ("TIDEGATE_PROTOCOL__ERROR_DELAY", "10ms"),
        ("TIDEGATE_TOPICS__ALLOW_OTHER", "false"),
    ])
    .unwrap();
    assert_eq!(config.jwt_secret.expose(), "12345");
    assert_eq!(config.limits.connections_max, 7);
    assert_eq!(config.notify_url().expose(), "postgres://a");
    assert_eq!(config.protocol.error_delay, Duration::from_millis(10));
    assert!(!config.topics.allow_other);
}

#[test]
fn all_mistakes_are_reported_together_and_without_secrets() {
    let ConfigError(mistakes) = load(&[
        ("TIDEGATE_LISTEN", "nowhere"),
        ("TIDEGATE_ADMIN_LISTEN", "0.0.0.0:9400"),
        ("TIDEGATE_LIMITS__CONNECTIONS_MAX", "many"),
        ("TIDEGATE_RELAY__LINGER", "soon"),
        ("TIDEGATE_NO_SUCH", "1"),
        ("TIDEGATE_PROTOCOL__ERROR_DELAY", "2s"),
        ("TIDEGATE_JWT_SECRET", "hidden-secret"),
    ])
    .unwrap_err();
    for name in [
        "listen",
        "admin_listen",
        "TIDEGATE_LIMITS__CONNECTIONS_MAX",
        "relay.linger",
        "TIDEGATE_NO_SUCH",
        "protocol.error_delay",
    ] {
        assert!(mistakes.iter().any(|text| text.starts_with(name)), "{name}: {mistakes:?}");
    }
    assert_eq!(mistakes.len(), 6, "{mistakes:?}");
    assert!(!mistakes.iter().any(|text| text.contains("hidden-secret")));
}

#[test]
fn the_database_is_looked_at_every_second_at_most() {
    for (interval, is_right) in [("1s", true), ("1h", true), ("999ms", false), ("0s", false)] {
        let loaded = load(&[("TIDEGATE_METRICS__DATABASE_INTERVAL", interval)]);
        assert_eq!(loaded.is_ok(), is_right, "{interval}");
    }
}

#[test]
fn so_many_events_may_have_series_and_no_more() {
    for (max, is_right) in [("0", true), ("1000", true), ("1001", false), ("-1", false)] {
        let loaded = load(&[("TIDEGATE_METRICS__EVENTS_MAX", max)]);
        assert_eq!(loaded.is_ok(), is_right, "{max}");
    }
}

#[test]
fn origins_and_proxies_that_cannot_be_read_are_mistakes() {
    let (config, _) = load(&[
        ("TIDEGATE_NETWORK__ORIGINS", "https://app.example.com, https://*.example.com, null"),
        ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "10.0.0.0/8, ::1, 2001:db8::/32"),
    ])
    .unwrap();
    assert_eq!((config.network.origins.len(), config.network.trusted_proxies.len()), (3, 3));
    for (name, bad) in [
        ("TIDEGATE_NETWORK__ORIGINS", "app.example.com"),
        ("TIDEGATE_NETWORK__ORIGINS", "https://app.example.com/"),
        ("TIDEGATE_NETWORK__ORIGINS", "*"),
        ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "10.0.0.0/33"),
        ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "proxy.example.com"),
        ("TIDEGATE_NETWORK__TRUSTED_PROXIES", "*"),
    ] {
        let ConfigError(mistakes) = load(&[(name, bad)]).unwrap_err();
        let [mistake] = mistakes.as_slice() else { panic!("{bad}: {mistakes:?}") };
        assert!(mistake.starts_with("network.") && mistake.contains("expected"), "{mistake}");
    }
}

#[test]
fn a_file_that_is_no_toml_is_named_without_the_line_that_may_be_a_secret() {
    let file = std::env::temp_dir().join(format!("tidegate-{}.toml", uuid::Uuid::new_v4()));
    std::fs::write(&file, "log = \"info\"\njwt_secret = \"hidden-secret\n").unwrap();
    let ConfigError(mistakes) = Config::load(Some(&file), Vec::new()).unwrap_err();
    std::fs::remove_file(&file).unwrap();
    let [mistake] = mistakes.as_slice() else { panic!("{mistakes:?}") };
    assert!(mistake.contains("line 2") && !mistake.contains("hidden"), "{mistake}");
}

#[test]
fn a_key_set_is_had_from_a_file_or_over_https() {
    for url in [
        "https://a.example/keys",
        "https://a.example",
        "HTTPS://127.0.0.1:8443/a?b=c",
        "https://[::1]/",
    ] {
        assert!(load(&[("TIDEGATE_JWKS__URL", url)]).is_ok(), "{url}");
    }
    for url in [
        "http://a.example/keys",
        "a.example",
        "/keys",
        "https:///keys",
        "https://u:p@a.example/",
        "file:///keys",
        "https://a.example/#keys",
        "wss://a.example",
        "https:// a.example",
    ] {
        let ConfigError(mistakes) = load(&[("TIDEGATE_JWKS__URL", url)]).unwrap_err();
        assert_eq!(mistakes, ["jwks.url: expected https://HOST/PATH, without a user"], "{url}");
    }
    for (variable, value) in [
        ("TIDEGATE_JWKS__FILE", "https://a.example/keys"),
        ("TIDEGATE_JWKS__FILE", "/etc/keys/"),
        ("TIDEGATE_JWKS__CA_FILE", "ca.pem"),
    ] {
        assert_eq!(load(&[(variable, value)]).unwrap_err().0.len(), 1, "{variable}={value}");
    }
    assert!(load(&[("TIDEGATE_AUTH__ISSUERS", "a, b")]).is_ok());
}

#[test]
fn the_grace_is_no_shorter_than_the_leeway() {
    assert!(load(&[("TIDEGATE_AUTH__LEEWAY", "30s")]).is_ok());
    assert!(load(&[("TIDEGATE_AUTH__LEEWAY", "31s")]).is_err());
}

#[test]
fn a_urls_password_is_hidden_wherever_it_stands() {
    for (url, shown) in [
        ("postgres://u:p@h/d", "postgres://u:<hidden>@h/d"),
        ("postgres://u:p:@//x@h/d?a=b", "postgres://u:<hidden>@h/d?a=b"),
        ("postgres://u@h/d?sslmode=require", "postgres://u@h/d?sslmode=require"),
        ("postgres://h/d?password=p&user=u", "postgres://h/d?password=<hidden>&user=u"),
    ] {
        assert_eq!(hide_password(url), shown);
    }
}

#[test]
fn the_printed_settings_can_be_read_again_and_hide_secrets() {
    let (_, effective) = load(&[("TIDEGATE_JWT_SECRET", "hidden-secret")]).unwrap();
    let printed = effective.to_toml().unwrap();
    assert!(!printed.contains("hidden-secret") && printed.contains("<hidden>"));
    assert!(Figment::from(Toml::string(&printed)).extract::<Config>().is_ok());
}
