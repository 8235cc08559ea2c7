//! Tokens that are good and are revoked: at once on all sockets, for as long as they live, on every
//! gateway.

use serde_json::{Value, json};
use tidegate::{clock::unix_now, db, protocol::serializer::Serializer, secret::Secret};

use crate::support::{
    client::Client,
    postgres::Database,
    server::{TestServer, config},
    token,
};

const ADMIN: &str = "admin-auction-AB3028";
const CACHE: &str = "cache_invalidate_AB3028";

/// A producer's token, issued so many seconds from now.
fn user(sub: &str, issued: i64) -> String {
    token::with_claims(json!({
        "role": "authenticated", "sub": sub, "session_id": format!("session-of-{sub}"),
        "jti": format!("token-of-{sub}"), "iat": unix_now() + issued,
        "admin_events": { "AB3028": "producer" },
    }))
}

async fn revoke(server: &TestServer, body: Value) -> (u16, Value) {
    let head = "POST /revoke HTTP/1.1";
    let (status, answer) = TestServer::request(server.admin, head, &body.to_string()).await;
    (status, serde_json::from_str(&answer).unwrap())
}

/// Joins with the user's token, over a connection of the anon key, and expects `ok`.
async fn join(client: &mut Client, reference: &str, sub_topic: &str, token: &str) {
    let topic = format!("realtime:{sub_topic}");
    let payload = json!({ "config": {}, "access_token": token });
    client.send(json!([reference, reference, topic, "phx_join", payload])).await;
    let ok = json!({ "status": "ok", "response": { "postgres_changes": [] } });
    client.expect(json!([reference, reference, topic, "phx_reply", ok])).await;
}

/// What a refused join is told.
async fn refused(client: &mut Client, sub_topic: &str, token: &str) {
    let topic = format!("realtime:{sub_topic}");
    client.send(json!(["9", "9", topic, "phx_join", { "access_token": token }])).await;
    let reason = "InvalidJWTToken: Token has been revoked";
    let payload = json!({ "status": "error", "response": { "reason": reason } });
    client.expect(json!(["9", "9", topic, "phx_reply", payload])).await;
}

/// The promise of the public topics holds for who is thrown out as for who is signed out.
#[tokio::test]
async fn a_revoked_user_loses_what_the_token_opened_and_keeps_what_anybody_may_see() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    let mut other = Client::connect(&server, Serializer::V2).await;
    join(&mut client, "1", "room", &user("u", -60)).await;
    join(&mut client, "2", ADMIN, &user("u", -60)).await;
    join(&mut client, "3", CACHE, &user("u", -60)).await;
    client.caught_up(CACHE).await;
    join(&mut other, "1", "room", &user("v", -60)).await;

    let (status, answer) = revoke(&server, json!({ "sub": "u" })).await;
    assert_eq!((status, &answer["via"]), (202, &json!("gateway")), "{answer}");
    let payload = json!({
        "message": "Token has been revoked", "status": "error", "extension": "system",
        "channel": "room",
    });
    client.expect(json!(["1", null, "realtime:room", "system", payload])).await;
    client.expect(json!(["1", "1", "realtime:room", "phx_close", {}])).await;
    server.publish(ADMIN, &json!({ "n": 1 })).await;
    client.expect_nothing().await;
    server.publish(CACHE, &json!({ "n": 2 })).await;
    client.hears(CACHE, json!({ "n": 2 })).await;
    server.publish("room", &json!({ "n": 3 })).await;
    other.hears("room", json!({ "n": 3 })).await;

    refused(&mut client, "room", &user("u", -60)).await;
    assert_eq!(server.metric("tidegate_revocations").await, 1.0);
    for client in [client, other] {
        client.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_revoked_token_opens_no_socket_and_no_rest() {
    let server = TestServer::start();
    let (token, service) = (
        user("u", -60),
        token::with_claims(json!({
            "role": "service_role", "jti": "leaked",
        })),
    );
    revoke(&server, json!({ "session_id": "session-of-u" })).await;
    revoke(&server, json!({ "jti": "leaked" })).await;
    let path = format!("/realtime/v1/websocket?apikey={token}");
    let answer = Client::refused(&server, &path).await;
    assert_eq!(answer.status(), 401);
    let body: Value = serde_json::from_slice(answer.body().as_ref().unwrap()).unwrap();
    assert_eq!(body, json!({ "error": "Token has been revoked" }));
    let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {service}");
    let message = json!({ "messages": [{ "topic": "room", "event": "e", "payload": {} }] });
    let (status, _) = TestServer::request(server.public, &head, &message.to_string()).await;
    assert_eq!(status, 401);
    server.stop().await;
}

/// Who signs in again is somebody whom the auth server has let in since.
#[tokio::test]
async fn a_later_sign_in_of_a_revoked_subject_holds() {
    let server = TestServer::start();
    revoke(&server, json!({ "sub": "u" })).await;
    let mut client = Client::connect(&server, Serializer::V2).await;
    refused(&mut client, "room", &user("u", -60)).await;
    join(&mut client, "1", "room", &user("u", 60)).await;
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_full_list_refuses_and_forgets_nobody() {
    let mut config = config();
    config.auth.revocations_max = 1;
    let server = TestServer::start_with(config);
    assert_eq!(revoke(&server, json!({ "sub": "a" })).await.0, 202);
    let (status, answer) = revoke(&server, json!({ "sub": "b" })).await;
    assert_eq!(status, 507);
    assert!(answer["message"].as_str().unwrap().contains("auth.revocations_max"), "{answer}");
    let mut client = Client::connect(&server, Serializer::V2).await;
    refused(&mut client, "room", &user("a", -60)).await;
    // One that is taken back makes room.
    assert_eq!(revoke(&server, json!({ "sub": "a", "for": "0s" })).await.0, 202);
    join(&mut client, "1", "room", &user("a", -60)).await;
    assert_eq!(revoke(&server, json!({ "sub": "b" })).await.0, 202);
    client.close().await;
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_is_not_one_claim_is_refused_by_name() {
    let server = TestServer::start();
    for body in [
        json!({}),
        json!({ "sub": "a", "jti": "b" }),
        json!({ "sub": 5 }),
        json!({ "sub": null }),
        json!({ "sub": "" }),
        json!({ "sub": "x".repeat(129) }),
        json!({ "sub": "a\nb" }),
        json!({ "role": "anon" }),
        json!({ "sub": "a", "for": "soon" }),
        json!({ "sub": "a", "for": "100y" }),
        json!(["a", null, null, null]),
    ] {
        let (status, answer) = revoke(&server, body.clone()).await;
        assert_eq!(status, 400, "{body}: {answer}");
        assert!(answer["message"].is_string());
    }
    assert_eq!(server.metric("tidegate_revocations").await, 0.0);
    server.stop().await;
}

/// A restart must not give anybody their token back.
#[tokio::test]
async fn a_revocation_reaches_another_gateway_and_the_next_process() {
    let database = Database::create().await;
    db::migrate(&Secret::from(database.url())).await.unwrap();
    let of_database = || {
        let mut config = config();
        config.database_url = Secret::from(database.url());
        config
    };
    let (one, two) = (TestServer::start_with(of_database()), TestServer::start_with(of_database()));
    one.link_is_up().await;
    two.link_is_up().await;
    let mut client = Client::connect(&two, Serializer::V2).await;
    join(&mut client, "1", "room", &user("u", -60)).await;
    let (status, answer) = revoke(&one, json!({ "sub": "u" })).await;
    assert_eq!((status, &answer["via"]), (202, &json!("database")), "{answer}");
    // Told by the one, the other ends what is joined there.
    let system = client.message().await;
    assert_eq!(system[4]["message"], "Token has been revoked", "{system}");
    client.expect(json!(["1", "1", "realtime:room", "phx_close", {}])).await;
    client.close().await;
    one.stop().await;
    two.stop().await;

    let next = TestServer::start_with(of_database());
    next.metric_reaches("tidegate_revocations", 1.0).await;
    let mut client = Client::connect(&next, Serializer::V2).await;
    refused(&mut client, "room", &user("u", -60)).await;
    assert_eq!(revoke(&next, json!({ "sub": "u", "for": "0s" })).await.0, 202);
    join(&mut client, "1", "room", &user("u", -60)).await;
    client.close().await;
    next.stop().await;
}

/// The operator must know that a restart would forget it.
#[tokio::test]
async fn a_revocation_that_cannot_be_stored_holds_here_and_says_so() {
    let database = Database::create().await;
    let mut config = config();
    config.database_url = Secret::from(database.url());
    let server = TestServer::start_with(config);
    let (status, answer) = revoke(&server, json!({ "sub": "u" })).await;
    assert_eq!((status, &answer["via"]), (202, &json!("gateway")), "{answer}");
    assert_eq!(answer["error"], "the database refuses it");
    let mut client = Client::connect(&server, Serializer::V2).await;
    refused(&mut client, "room", &user("u", -60)).await;
    client.close().await;
    server.stop().await;
}

/// Whoever may notify can make a gateway look, and nothing else.
#[tokio::test]
async fn a_forged_notification_of_revocations_revokes_nobody() {
    let mut database = Database::create().await;
    db::migrate(&Secret::from(database.url())).await.unwrap();
    let mut config = config();
    config.database_url = Secret::from(database.url());
    let server = TestServer::start_with(config);
    server.link_is_up().await;
    let mut client = Client::connect(&server, Serializer::V2).await;
    join(&mut client, "1", "room", &user("u", -60)).await;
    for payload in ["", "{\"sub\":\"u\"}", "sub u"] {
        database.notify("tidegate_revocations", payload).await;
    }
    let noted = "tidegate_notifications_total{outcome=\"noted\",source=\"revocations\"}";
    server.metric_reaches(noted, 3.0).await;
    client.expect_nothing().await;
    assert_eq!(server.metric("tidegate_revocations").await, 0.0);
    client.close().await;
    server.stop().await;
}
