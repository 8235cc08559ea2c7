//! Tokens that change and tokens that end, while channels are joined.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::{clock::unix_now, protocol::serializer::Serializer, server::Gateway};

use crate::support::{
    client::{Client, invalidations},
    page::{Page, browser},
    server::{TestServer, config, config_of_long_windows},
    token,
};

const ADMIN: &str = "admin-auction-AB3028";
const CACHE: &str = "cache_invalidate_AB3028";

/// A producer of event AB3028, for so many seconds: a second's rest and as many whole ones.
fn producer(seconds: i64) -> String {
    token::with_claims(json!({
        "role": "authenticated", "exp": unix_now() + seconds,
        "admin_events": { "AB3028": "producer" },
    }))
}

fn short(role: &str, seconds: i64) -> String {
    token::with_claims(json!({ "role": role, "exp": unix_now() + seconds }))
}

async fn join_as(client: &mut Client, reference: &str, sub_topic: &str, token: &str) {
    let topic = format!("realtime:{sub_topic}");
    let payload = json!({ "config": {}, "access_token": token });
    client.send(json!([reference, reference, topic, "phx_join", payload])).await;
    let ok = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    client.expect(json!([reference, reference, topic, "phx_reply", ok])).await;
}

/// Sends the event, which is met with silence.
async fn refresh(client: &mut Client, reference: &str, sub_topic: &str, token: &str) {
    let topic = format!("realtime:{sub_topic}");
    let payload = json!({ "access_token": token });
    client.send(json!([reference, "t", topic, "access_token", payload])).await;
    client.expect_nothing().await;
}

/// The end of an ordinary channel whose token has just expired; waits for it.
async fn expires(client: &mut Client, reference: &str, sub_topic: &str) {
    let topic = format!("realtime:{sub_topic}");
    let system = client.message().await;
    let message = system[4]["message"].as_str().unwrap_or_default();
    // The second may turn between the expiry and the look at the clock.
    assert!(
        message == "Token has expired 0 seconds ago"
            || message == "Token has expired 1 seconds ago",
        "{system}"
    );
    let payload = json!({
        "message": message, "status": "error", "extension": "system", "channel": sub_topic,
    });
    assert_eq!(system, json!([reference, null, topic, "system", payload]));
    client.expect(json!([reference, reference, topic, "phx_close", {}])).await;
}

async fn hears_next(server: &TestServer, client: &mut Client, sub_topic: &str, payload: Value) {
    server.publish(sub_topic, &payload).await;
    client.hears(sub_topic, payload).await;
}

/// The first join of a signed-in user comes with the anon key; its own token follows.
#[tokio::test]
async fn a_withheld_channel_hears_from_the_token_that_proves_it_until_one_that_does_not() {
    let server = TestServer::start();
    for serializer in [Serializer::V1, Serializer::V2] {
        let mut client = Client::connect(&server, serializer).await;
        let admin = client.join(ADMIN).await;
        let voting = client.join("admin-voting-AB3028").await;
        server.publish(ADMIN, &json!({ "n": 1 })).await;
        client.expect_nothing().await;

        refresh(&mut client, &admin, ADMIN, &producer(3600)).await;
        hears_next(&server, &mut client, ADMIN, json!({ "n": 2 })).await;
        // It was said to one channel only.
        server.publish("admin-voting-AB3028", &json!({ "n": 3 })).await;
        client.expect_nothing().await;
        refresh(&mut client, &voting, "admin-voting-AB3028", &producer(3600)).await;
        hears_next(&server, &mut client, "admin-voting-AB3028", json!({ "n": 4 })).await;

        // A token of the same rights changes nothing: no gap, no second delivery.
        refresh(&mut client, &admin, ADMIN, &producer(7200)).await;
        hears_next(&server, &mut client, ADMIN, json!({ "n": 5 })).await;
        client.expect_nothing().await;

        // The user signs out, or loses the role.
        refresh(&mut client, &admin, ADMIN, &token::of_role("authenticated")).await;
        server.publish(ADMIN, &json!({ "n": 6 })).await;
        client.expect_nothing().await;
        refresh(&mut client, &admin, ADMIN, &producer(3600)).await;
        hears_next(&server, &mut client, ADMIN, json!({ "n": 7 })).await;
        client.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_re_join_decides_anew_in_both_directions() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    join_as(&mut client, "1", ADMIN, &token::of_role("anon")).await;
    join_as(&mut client, "2", ADMIN, &producer(3600)).await;
    client.expect(json!(["1", "1", format!("realtime:{ADMIN}"), "phx_close", {}])).await;
    hears_next(&server, &mut client, ADMIN, json!({ "n": 1 })).await;
    join_as(&mut client, "3", ADMIN, &token::of_role("anon")).await;
    client.expect(json!(["2", "2", format!("realtime:{ADMIN}"), "phx_close", {}])).await;
    server.publish(ADMIN, &json!({ "n": 2 })).await;
    client.expect_nothing().await;
    assert_eq!(server.metric("tidegate_topics").await, 0.0);
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn an_ordinary_channel_ends_with_its_token_and_the_socket_stays() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    join_as(&mut client, "1", "room", &short("authenticated", 3)).await;
    join_as(&mut client, "2", "longer", &short("authenticated", 3600)).await;
    hears_next(&server, &mut client, "room", json!({ "n": 1 })).await;
    expires(&mut client, "1", "room").await;
    // It is as if it had not been joined.
    server.publish("room", &json!({ "n": 2 })).await;
    client.send(json!(["1", "3", "realtime:room", "broadcast", {}])).await;
    let unmatched = json!({ "status": "error", "response": { "reason": "unmatched topic" } });
    client.expect(json!([null, "3", "realtime:room", "phx_reply", unmatched])).await;
    hears_next(&server, &mut client, "longer", json!({ "n": 3 })).await;
    assert_eq!(server.metric("tidegate_channels").await, 1.0);
    join_as(&mut client, "4", "room", &short("authenticated", 3600)).await;
    hears_next(&server, &mut client, "room", json!({ "n": 4 })).await;
    client.close().await;
    server.stop().await;
}

/// A handshake token's end closes nothing but the channels that live on it.
#[tokio::test]
async fn a_channel_without_a_token_of_its_own_ends_with_that_of_the_connection() {
    let server = TestServer::start();
    let mut client = Client::with_token(&server, Serializer::V1, &short("anon", 3)).await;
    let joined = client.join("room").await;
    join_as(&mut client, "2", "own", &token::of_role("authenticated")).await;
    let system = client.message().await;
    assert_eq!((&system[2], &system[3]), (&json!("realtime:room"), &json!("system")), "{system}");
    client.expect(json!([null, joined, "realtime:room", "phx_close", {}])).await;
    hears_next(&server, &mut client, "own", json!({ "n": 1 })).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_new_token_before_the_end_of_the_old_one_keeps_the_channel() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    join_as(&mut client, "1", "kept", &short("authenticated", 2)).await;
    refresh(&mut client, "1", "kept", &short("authenticated", 3600)).await;
    // Ends later than the first token of the other channel would have.
    join_as(&mut client, "2", "marker", &short("authenticated", 3)).await;
    expires(&mut client, "2", "marker").await;
    hears_next(&server, &mut client, "kept", json!({ "n": 1 })).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_new_token_that_ends_earlier_ends_the_channel_earlier() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    join_as(&mut client, "1", "room", &short("authenticated", 3600)).await;
    refresh(&mut client, "1", "room", &short("authenticated", 2)).await;
    expires(&mut client, "1", "room").await;
    client.close().await;
    server.stop().await;
}

/// For production clients a close is final, and who is signed out may read these topics anyway.
#[tokio::test]
async fn a_cache_topic_goes_on_when_all_its_tokens_have_ended() {
    let server = TestServer::start();
    let mut client = Client::with_token(&server, Serializer::V1, &short("authenticated", 2)).await;
    client.join(CACHE).await;
    join_as(&mut client, "own", "auction_winner_AB3028", &short("authenticated", 2)).await;
    join_as(&mut client, "marker", "room", &short("authenticated", 3)).await;
    let system = client.message().await;
    assert_eq!((&system[2], &system[3]), (&json!("realtime:room"), &json!("system")), "{system}");
    client.expect(json!([null, "marker", "realtime:room", "phx_close", {}])).await;
    hears_next(&server, &mut client, CACHE, json!({ "n": 1 })).await;
    hears_next(&server, &mut client, "auction_winner_AB3028", json!({ "n": 2 })).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn an_expired_token_keeps_no_admin_reads_and_a_new_one_brings_them_back() {
    let server = TestServer::start();
    // By a token of the channel's own, and by that of the connection.
    let mut by_channel = Client::connect(&server, Serializer::V2).await;
    join_as(&mut by_channel, "1", ADMIN, &producer(3)).await;
    let mut by_connection = Client::with_token(&server, Serializer::V1, &producer(3)).await;
    by_connection.join(ADMIN).await;
    server.publish(ADMIN, &json!({ "n": 1 })).await;
    by_channel.hears(ADMIN, json!({ "n": 1 })).await;
    by_connection.hears(ADMIN, json!({ "n": 1 })).await;

    server.metric_falls_to("tidegate_topics", 0.0).await;
    server.publish(ADMIN, &json!({ "n": 2 })).await;
    // Not a word: the channel is joined, and withheld.
    by_channel.expect_nothing().await;
    by_connection.expect_nothing().await;
    assert_eq!(server.metric("tidegate_channels").await, 2.0);

    refresh(&mut by_channel, "1", ADMIN, &producer(3600)).await;
    hears_next(&server, &mut by_channel, ADMIN, json!({ "n": 3 })).await;
    by_connection.expect_nothing().await;
    by_channel.close().await;
    by_connection.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_join_with_an_expired_admin_token_is_withheld() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    join_as(&mut client, "1", ADMIN, &producer(-1)).await;
    server.publish(ADMIN, &json!({ "n": 1 })).await;
    client.expect_nothing().await;
    let expired = "tidegate_tokens_total{result=\"expired\"}";
    assert_eq!(server.metric(expired).await, 1.0);
    // Neither does an expired one that comes later open it, nor close a channel that is open.
    refresh(&mut client, "1", ADMIN, &producer(-10)).await;
    server.publish(ADMIN, &json!({ "n": 2 })).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

/// With the service's key as the connection's token, a channel without its own may write; with
/// the user's token it may not, and may again not once that has expired into the anon key.
#[tokio::test]
async fn the_right_to_write_follows_the_channels_token() {
    let server = TestServer::start_with(config_of_long_windows());
    let mut client =
        Client::with_token(&server, Serializer::V2, &token::of_role("service_role")).await;
    let joined = client.join_with(CACHE, json!({ "broadcast": { "self": true } })).await;
    client.publish(CACHE, json!({ "n": 1 })).await;
    client.hears(CACHE, json!({ "n": 1 })).await;
    refresh(&mut client, &joined, CACHE, &token::of_role("authenticated")).await;
    client.publish(CACHE, json!({ "n": 2 })).await;
    let topic = format!("realtime:{CACHE}");
    for frame in invalidations(Serializer::V2, &joined, &topic, "/forged") {
        client.send_frame(frame).await;
    }
    client.expect_nothing().await;
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"write_denied\"}").await, 3.0);
    hears_next(&server, &mut client, CACHE, json!({ "n": 3 })).await;
    // Nor was it merged: with the right that comes back, the first invalidation leaves as it is.
    refresh(&mut client, &joined, CACHE, &token::of_role("service_role")).await;
    for frame in invalidations(Serializer::V2, &joined, &topic, "/true").into_iter().take(1) {
        client.send_frame(frame).await;
    }
    let payload = json!({ "type": "forged", "endpoints": ["/true"] });
    assert_eq!(client.broadcast().await.1["payload"], payload);
    client.close().await;
    server.stop().await;
}

/// The timer that ends a channel may be late; who writes is asked for the end of the token.
#[tokio::test]
async fn a_channel_whose_token_has_ended_writes_nothing_before_the_tick() {
    let gateway = Gateway::new(config()).unwrap();
    let exp = unix_now() + 1;
    let token = token::with_claims(json!({ "role": "authenticated", "exp": exp }));
    let mut writer = Page::with_token(&gateway, browser(1), &token);
    let mut reader = Page::open(&gateway, browser(2));
    writer.join("1", "room").await;
    reader.join("1", "room").await;
    while unix_now() < exp {
        tokio::task::yield_now().await;
    }
    let push = json!({ "type": "broadcast", "event": "e", "payload": {} });
    writer.send(json!(["1", "2", "realtime:room", "broadcast", push])).await;
    reader.expect_nothing().await;
    assert_eq!(writer.message().await[3], "system");
    assert_eq!(writer.message().await[3], "phx_close");
}

#[tokio::test]
async fn a_token_without_a_signer_closes_an_ordinary_channel_with_the_reference_servers_text() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    // {"alg":"ES256","kid":"k1","typ":"JWT"}, {"role":"anon","exp":9999999999}
    let token = "eyJhbGciOiJFUzI1NiIsImtpZCI6ImsxIiwidHlwIjoiSldUIn0\
                 .eyJyb2xlIjoiYW5vbiIsImV4cCI6OTk5OTk5OTk5OX0.AAAA";
    let text = "Failed to generate JWT signer for key ID (kid) \"k1\", \
                check your JWT secret or JWKS configuration";
    let payload = json!({ "config": {}, "access_token": token });
    client.send(json!(["1", "1", "realtime:room", "phx_join", payload])).await;
    let reason = format!("JwtSignerError: {text}");
    let refused = json!({ "status": "error", "response": { "reason": reason } });
    client.expect(json!(["1", "1", "realtime:room", "phx_reply", refused])).await;
    let joined = client.join("room").await;
    let payload = json!({ "access_token": token });
    client.send(json!([joined, "2", "realtime:room", "access_token", payload])).await;
    let system = json!({
        "message": text, "status": "error", "extension": "system", "channel": "room",
    });
    client.expect(json!([joined, null, "realtime:room", "system", system])).await;
    client.expect(json!([joined, joined, "realtime:room", "phx_close", {}])).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;
}

/// Clocks differ, and a client that refreshes its token at the last moment is not in the wrong.
#[tokio::test]
async fn a_token_that_has_just_ended_is_let_in_and_its_channel_lives_for_the_grace() {
    let ended = token::with_claims(json!({ "role": "anon", "exp": unix_now() - 30 }));
    let payload = json!({ "config": {}, "access_token": ended });
    let joined = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    let mut settings = config();
    settings.auth.leeway = Duration::from_secs(600);
    settings.auth.grace = Duration::from_secs(600);
    let server = TestServer::start_with(settings.clone());
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.send(json!(["1", "1", "realtime:room", "phx_join", payload])).await;
    client.expect(json!(["1", "1", "realtime:room", "phx_reply", joined])).await;
    client.expect_nothing().await;
    client.close().await;
    server.stop().await;

    // A channel does not live for the leeway.
    settings.auth.grace = Duration::from_secs(20);
    let server = TestServer::start_with(settings);
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.send(json!(["1", "1", "realtime:room", "phx_join", payload])).await;
    client.expect(json!(["1", "1", "realtime:room", "phx_reply", joined])).await;
    assert_eq!(client.message().await[3], "system");
    client.expect(json!(["1", "1", "realtime:room", "phx_close", {}])).await;
    client.close().await;
    server.stop().await;
}
