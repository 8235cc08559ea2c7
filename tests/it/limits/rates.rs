//! How much of everything: at each limit, and one past it. Nothing here is ever an error or a close
//! on a public cache topic.

use std::time::Duration;

use serde_json::{Value, json};
use tidegate::{protocol::serializer::Serializer, server::Config};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use crate::support::{
    client::Client,
    raw::{Answer, answer, ask, frame, post, send, upgrade},
    server::{DEADLINE, TestServer, config},
    token,
};

const CACHE: &str = "cache_invalidate_AB3028";
const WINNER: &str = "auction_winner_AB3028";
const BATCH: &str = "/realtime/v1/api/broadcast";

fn server(set: impl FnOnce(&mut Config)) -> TestServer {
    let mut config = config();
    set(&mut config);
    TestServer::start_with(config)
}

fn socket_path(key: &str) -> String {
    format!("/realtime/v1/websocket?vsn=2.0.0&apikey={key}")
}

/// An upgrade with the anon key and these headers, and its connection.
async fn knock(server: &TestServer, headers: &[&str]) -> (Answer, TcpStream) {
    knock_with(server, &token::of_role("anon"), headers).await
}

async fn knock_with(server: &TestServer, key: &str, headers: &[&str]) -> (Answer, TcpStream) {
    let mut stream = send(server, upgrade(&socket_path(key), headers)).await;
    (answer(&mut stream).await, stream)
}

/// Knocks with a wrong key until that is refused unread: how many were read, and the refusal. One
/// a second more than ten are, on a slow machine.
async fn until_unread(server: &TestServer, header: &str) -> (f64, Answer) {
    for read in 0..1000 {
        let (answer, _) = knock_with(server, "garbage", &[header]).await;
        if answer.status != 401 {
            assert_eq!(answer.status, 429);
            return (f64::from(read), answer);
        }
    }
    panic!("all are read");
}

async fn broadcast(server: &TestServer, key: &str, topics: &[&str]) -> Answer {
    let message = |topic| json!({ "topic": topic, "event": "e", "payload": { "n": 1 } });
    let messages: Vec<Value> = topics.iter().map(message).collect();
    let apikey = format!("apikey: {key}");
    ask(server, post(BATCH, &[&apikey], json!({ "messages": messages }).to_string())).await
}

fn limited(limiter: &str, effect: &str) -> String {
    format!("tidegate_limited_total{{effect=\"{effect}\",limiter=\"{limiter}\"}}")
}

/// Whoever views an event is served, whatever else happens: joins, is caught up, hears.
async fn expect_a_viewer_is_served(server: &TestServer) {
    let mut viewer = Client::connect(server, Serializer::V1).await;
    viewer.join(CACHE).await;
    viewer.ends().await;
}

fn trust_all(config: &mut Config) {
    config.network.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap()];
}

#[tokio::test]
async fn an_address_has_so_many_sockets_and_one_more_is_refused_at_once() {
    let server = server(|config| {
        trust_all(config);
        config.limits.connections_per_address_max = 2;
        config.protocol.error_delay = Duration::from_millis(1500);
    });
    let one = "x-forwarded-for: 192.0.2.1";
    let (first, held) = knock(&server, &[one]).await;
    let (second, second_held) = knock(&server, &[one]).await;
    let (third, _) = knock(&server, &[one]).await;
    assert_eq!((first.status, second.status, third.status), (101, 101, 429));
    assert_eq!(third.json(), json!({ "error": "Too many connected users" }));
    // Neither does it count under another spelling of the address, nor against another one.
    let (mapped, _) = knock(&server, &["x-forwarded-for: ::ffff:192.0.2.1"]).await;
    let (other, other_held) = knock(&server, &["x-forwarded-for: 192.0.2.2"]).await;
    assert_eq!((mapped.status, other.status), (429, 101));
    assert_eq!(
        server.metric("tidegate_connections_refused_total{reason=\"address_full\"}").await,
        2.0
    );
    assert_eq!(server.metric(&limited("address_connections", "refused")).await, 2.0);
    assert_eq!(server.metric("tidegate_addresses").await, 2.0);
    drop(held);
    while knock(&server, &[one]).await.0.status != 101 {}
    drop((second_held, other_held));
    server.stop().await;
}

/// The IPv6 addresses of one subscriber are one.
#[tokio::test]
async fn ipv6_is_counted_by_its_64() {
    let server = server(|config| {
        trust_all(config);
        config.limits.connections_per_address_max = 1;
    });
    let (first, _held) = knock(&server, &["x-forwarded-for: 2001:db8::1"]).await;
    let (same, _) = knock(&server, &["x-forwarded-for: 2001:db8::ffff:1:2:3"]).await;
    let (next, _next) = knock(&server, &["x-forwarded-for: 2001:db8:0:1::1"]).await;
    assert_eq!((first.status, same.status, next.status), (101, 429, 101));
    drop((_held, _next));
    server.stop().await;
}

#[tokio::test]
async fn nobody_gets_another_address_by_naming_one() {
    let untrusting = server(|config| config.limits.connections_per_address_max = 1);
    let (first, held) = knock(&untrusting, &[]).await;
    assert_eq!(first.status, 101);
    for claim in ["x-forwarded-for: 192.0.2.9", "forwarded: for=192.0.2.9", "x-real-ip: 192.0.2.9"]
    {
        assert_eq!(knock(&untrusting, &[claim]).await.0.status, 429, "{claim}");
    }
    drop(held);
    untrusting.stop().await;
    let trusting = server(|config| {
        trust_all(config);
        config.limits.connections_per_address_max = 1;
    });
    let (first, held) = knock(&trusting, &["x-forwarded-for: 192.0.2.9"]).await;
    assert_eq!(first.status, 101);
    // What the proxy has seen stands last, in the last header.
    for claims in [
        &["x-forwarded-for: 198.51.100.1, 192.0.2.9"][..],
        &["x-forwarded-for: 198.51.100.1", "x-forwarded-for: 192.0.2.9"],
        &["x-forwarded-for: 198.51.100.1, 127.0.0.9, 192.0.2.9, 127.0.0.2"],
        &["x-forwarded-for: garbage, 192.0.2.9"],
    ] {
        assert_eq!(knock(&trusting, claims).await.0.status, 429, "{claims:?}");
    }
    drop(held);
    trusting.stop().await;
}

#[tokio::test]
async fn handshakes_beyond_ten_seconds_worth_are_refused_at_once_and_unread() {
    let server = server(|config| {
        trust_all(config);
        config.limits.handshakes_per_address_max = 1;
    });
    let (read, refused) = until_unread(&server, "x-forwarded-for: 192.0.2.1").await;
    assert_eq!(refused.json(), json!({ "error": "Too many joins per second" }));
    assert_eq!(server.metric("tidegate_tokens_total{result=\"malformed\"}").await, read);
    assert_eq!(
        server.metric("tidegate_connections_refused_total{reason=\"handshakes\"}").await,
        1.0
    );
    assert_eq!(server.metric(&limited("address_handshakes", "refused")).await, 1.0);
    // A neighbour of another address is served.
    let (other, stream) = knock(&server, &["x-forwarded-for: 192.0.2.2"]).await;
    assert_eq!(other.status, 101);
    drop(stream);
    server.stop().await;
}

/// All viewers of a venue have one address and the same anon key: one of them who tries wrong keys
/// must not lock the others out.
#[tokio::test]
async fn one_bad_neighbour_locks_out_nobody_who_has_a_token() {
    let server = server(|config| {
        trust_all(config);
        config.limits.failures_per_address_max = 1;
    });
    let venue = "x-forwarded-for: 192.0.2.1";
    let anon = token::of_role("anon");
    let (first, held) = knock_with(&server, &anon, &[venue]).await;
    assert_eq!(first.status, 101);
    let (read, unread) = until_unread(&server, venue).await;
    assert_eq!(unread.json(), json!({ "error": "Too many requests" }));
    assert_eq!(server.metric("tidegate_tokens_total{result=\"malformed\"}").await, read);
    // One that was never seen before, of somebody who has just signed in.
    let fresh = token::with_claims(json!({ "role": "authenticated", "sub": "somebody" }));
    let (answer, fresh_held) = knock_with(&server, &fresh, &[venue]).await;
    assert_eq!(answer.status, 101);
    // Wrong ones of its form are read, too, and are wrong.
    let forged = token::forged(&json!({ "role": "anon" }));
    assert_eq!(knock_with(&server, &forged, &[venue]).await.0.status, 401);
    drop(fresh_held);
    let (known, stream) = knock_with(&server, &anon, &[venue]).await;
    assert_eq!(known.status, 101);
    let rest = async |key: &str, address: &str| {
        let apikey = format!("apikey: {key}");
        let body = json!({ "messages": [{ "topic": "t", "event": "e", "payload": {} }] });
        ask(&server, post(BATCH, &[&apikey, address], body.to_string())).await
    };
    let mut unread = rest("garbage", venue).await;
    while unread.status == 401 {
        unread = rest("garbage", venue).await;
    }
    assert_eq!((unread.status, unread.json()), (429, json!({ "message": "Too many requests" })));
    assert_eq!(rest(&anon, venue).await.status, 202);
    // Elsewhere nothing has happened.
    assert_eq!(rest("garbage", "x-forwarded-for: 192.0.2.2").await.status, 401);
    assert!(server.metric(&limited("address_failures", "refused")).await >= 2.0);
    let refused = "tidegate_connections_refused_total{reason=\"failures\"}";
    assert!(server.metric(refused).await >= 1.0);
    drop((held, stream));
    server.stop().await;
}

/// A venue's people who have signed in have a token each, which nobody has seen before.
#[tokio::test]
async fn good_tokens_of_one_address_are_never_counted_as_guesses() {
    let server = server(|config| config.limits.failures_per_address_max = 1);
    for n in 0..40 {
        let of = |door: &str| token::with_claims(json!({ "role": "anon", "n": n, "door": door }));
        assert_eq!(knock_with(&server, &of("socket"), &[]).await.0.status, 101, "{n}");
        assert_eq!(broadcast(&server, &of("rest"), &["t"]).await.status, 202, "{n}");
    }
    server.stop().await;
}

#[tokio::test]
async fn wrong_tokens_of_rest_are_counted_with_those_of_upgrades() {
    let server = server(|config| config.limits.failures_per_address_max = 1);
    let mut read = 0;
    while broadcast(&server, "garbage", &["t"]).await.status == 401 {
        read += 1;
    }
    assert!(read >= 10, "{read}");
    let (read, _) = until_unread(&server, "accept: */*").await;
    assert!(read < 10.0, "ten more are looked at: {read}");
    // Whoever brings none has nothing that could be read.
    let answer = ask(&server, upgrade("/socket/websocket", &[])).await;
    assert_eq!(answer.status, 401);
    server.stop().await;
}

#[tokio::test]
async fn joins_beyond_the_projects_rate_are_refused_where_no_rule_binds_and_nobody_is_closed() {
    // A share is one a second at least, half of the project's.
    let server = server(|config| config.limits.joins_per_second_max = 2);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let mut joined = 0;
    let refused = loop {
        let topic = format!("realtime:t{joined}");
        client.send(json!(["1", "1", topic, "phx_join", { "config": {} }])).await;
        let reply = client.message().await;
        if reply[4]["status"] != "ok" {
            break reply[4].clone();
        }
        joined += 1;
    };
    assert!((60..500).contains(&joined), "{joined}");
    let reason = "ClientJoinRateLimitReached: Too many joins per second";
    assert_eq!(refused, json!({ "status": "error", "response": { "reason": reason } }));
    assert_eq!(server.metric(&limited("client_joins", "refused")).await, 1.0);
    // It was the share of the client, and others have theirs.
    let person = token::with_claims(json!({ "role": "authenticated", "sub": "somebody" }));
    let mut other = Client::with_token(&server, Serializer::V2, &person).await;
    other.join("room").await;
    other.ends().await;
    // The topics of rules are joined at any rate, also those that are withheld.
    client.join(CACHE).await;
    client.join(WINNER).await;
    client.join("admin-auction-AB3028").await;
    expect_a_viewer_is_served(&server).await;
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_channel_that_alone_exceeds_its_share_ends_as_upstream_and_no_other_does() {
    let server = server(|config| config.limits.broadcasts_per_second_max = 1);
    // A neighbour: the same address, the same key.
    let mut neighbour = Client::connect(&server, Serializer::V2).await;
    neighbour.join("room").await;
    let mut viewer = Client::connect(&server, Serializer::V2).await;
    viewer.join("room").await;
    let mut client = Client::connect(&server, Serializer::V2).await;
    let joined = client.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    let envelope = json!({ "type": "broadcast", "event": "e", "payload": { "n": 1 } });
    let mut sent = 0;
    let shutdown = loop {
        client.send(json!([joined, "1", "realtime:room", "broadcast", envelope])).await;
        let answer = client.message().await;
        if answer[3] != "phx_reply" {
            break answer;
        }
        for listener in [&mut viewer, &mut neighbour] {
            listener.hears("room", json!({ "n": 1 })).await;
        }
        sent += 1;
    };
    assert!((60..1000).contains(&sent), "{sent}");
    let payload = json!({ "extension": "system", "status": "error", "channel": "room",
        "message": "Too many messages per second" });
    assert_eq!(shutdown, json!([joined, null, "realtime:room", "system", payload]));
    client.expect(json!([joined, joined, "realtime:room", "phx_close", {}])).await;
    client.expect_nothing().await;
    // Those who only listen keep what they have.
    viewer.expect_nothing().await;
    assert_eq!(server.metric(&limited("client_broadcasts", "closed")).await, 1.0);
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"channel_rate\"}").await, 1.0);
    // What the neighbour says finds the share of both used up, and is dropped; its channel stays.
    let dropped = limited("client_broadcasts", "dropped");
    while server.metric(&dropped).await < 1.0 {
        neighbour.publish("room", json!({ "n": 2 })).await;
        neighbour.send(json!([null, "beat", "phoenix", "heartbeat", {}])).await;
        assert_eq!(neighbour.message().await[3], "phx_reply");
    }
    neighbour.expect_nothing().await;
    expect_a_viewer_is_served(&server).await;
    for client in [client, viewer, neighbour] {
        client.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn on_a_rules_topic_a_broadcast_beyond_the_rate_is_dropped_and_the_channel_stays() {
    let server = server(|config| config.limits.server_broadcasts_per_second_max = 1);
    let service = token::of_role("service_role");
    let mut sender = Client::with_token(&server, Serializer::V2, &service).await;
    sender.join_with(WINNER, json!({ "broadcast": { "self": true } })).await;
    let mut heard = 0;
    loop {
        sender.publish(WINNER, json!({ "n": 1 })).await;
        sender.send(json!([null, "beat", "phoenix", "heartbeat", {}])).await;
        if sender.message().await[3] == "phx_reply" {
            break;
        }
        assert_eq!(sender.message().await[3], "phx_reply");
        heard += 1;
    }
    assert!((60..1000).contains(&heard), "{heard}");
    sender.expect_nothing().await;
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"rate\"}").await, 1.0);
    assert_eq!(server.metric(&limited("server_broadcasts", "dropped")).await, 1.0);
    // Whoever may not write uses up nothing, and learns nothing.
    let mut stranger = Client::connect(&server, Serializer::V2).await;
    stranger.join(WINNER).await;
    stranger.publish(WINNER, json!({ "n": 3 })).await;
    stranger.expect_nothing().await;
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"write_denied\"}").await, 1.0);
    assert_eq!(server.metric("tidegate_channels").await, 2.0);
    expect_a_viewer_is_served(&server).await;
    stranger.ends().await;
    sender.ends().await;
    server.stop().await;
}

/// Else one message to the viewers of an event would use up the project's rate.
#[tokio::test]
async fn deliveries_are_not_counted() {
    let server = server(|config| config.limits.broadcasts_per_second_max = 1);
    let mut viewers = Vec::new();
    for _ in 0..10 {
        let mut viewer = Client::connect(&server, Serializer::V2).await;
        viewer.join("room").await;
        viewers.push(viewer);
    }
    for _ in 0..60 {
        assert_eq!(broadcast(&server, &token::of_role("anon"), &["room"]).await.status, 202);
    }
    for viewer in &mut viewers {
        for _ in 0..60 {
            viewer.hears("room", json!({ "n": 1 })).await;
        }
    }
    for viewer in viewers {
        viewer.close().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_batch_that_does_not_fit_is_refused_whole_with_429() {
    let server = server(|config| config.limits.broadcasts_per_second_max = 1);
    let (anon, service) = (token::of_role("anon"), token::of_role("service_role"));
    let mut viewer = Client::connect(&server, Serializer::V2).await;
    viewer.join("room").await;
    // What may not be written uses up its sender's share, and nothing of the project's.
    let stranger = token::with_claims(json!({ "role": "authenticated", "sub": "stranger" }));
    assert_eq!(broadcast(&server, &stranger, &[WINNER; 61]).await.status, 429);
    assert_eq!(broadcast(&server, &stranger, &[WINNER; 60]).await.status, 202);
    assert_eq!(broadcast(&server, &anon, &["elsewhere"; 58]).await.status, 202);
    let too_large = broadcast(&server, &anon, &["room"; 50]).await;
    assert_eq!(too_large.status, 429);
    let text = "Too many messages to broadcast, please reduce the batch size";
    assert_eq!(too_large.json(), json!({ "message": text }));
    viewer.expect_nothing().await;
    assert_eq!(broadcast(&server, &anon, &["room", "room"]).await.status, 202);
    viewer.hears("room", json!({ "n": 1 })).await;
    viewer.hears("room", json!({ "n": 1 })).await;
    // What comes back in a second is taken by an earlier turn.
    let text = "You have exceeded your rate limit";
    let mut over = broadcast(&server, &service, &["elsewhere"]).await;
    while over.status == 202 {
        over = broadcast(&server, &service, &["elsewhere"]).await;
    }
    assert_eq!((over.status, over.json()), (429, json!({ "message": text })));
    let path = format!("{BATCH}/elsewhere/events/e");
    let single = post(&path, &[&format!("apikey: {anon}")], "{}");
    let mut over = ask(&server, &single).await;
    while over.status == 202 {
        over = ask(&server, &single).await;
    }
    assert_eq!((over.status, over.json()), (429, json!({ "message": text })));
    assert_eq!(server.metric(&limited("client_broadcasts", "refused")).await, 3.0);
    assert_eq!(server.metric(&limited("broadcasts", "refused")).await, 1.0);
    expect_a_viewer_is_served(&server).await;
    viewer.ends().await;
    server.stop().await;
}

/// The limits as everybody has them.
fn default_limits(config: &mut Config) {
    config.limits = Config::defaults().limits;
}

/// A person who signs in has a share, wherever others flood from.
#[tokio::test]
async fn one_client_uses_up_its_own_share_and_servers_and_persons_are_heard() {
    let server = server(|config| {
        default_limits(config);
        // A slow machine does not send as many.
        config.limits.requests_per_address_max = 2;
    });
    let (anon, service) = (token::of_role("anon"), token::of_role("service_role"));
    let person = token::with_claims(json!({ "role": "authenticated", "sub": "somebody" }));
    let mut viewer = Client::connect(&server, Serializer::V2).await;
    viewer.join(WINNER).await;
    let mut talker = Client::with_token(&server, Serializer::V2, &person).await;
    let talk = talker.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    assert_eq!(broadcast(&server, &service, &[WINNER]).await.status, 202);
    viewer.hears(WINNER, json!({ "n": 1 })).await;
    // Messages until nothing more is taken, and then requests until none is read.
    let over = loop {
        let answer = broadcast(&server, &anon, &["elsewhere"; 200]).await;
        if answer.status != 202 {
            break answer;
        }
    };
    assert_eq!(over.status, 429);
    let apikey = format!("apikey: {anon}");
    let unread = post(BATCH, &[&apikey, "expect: 100-continue"], "{");
    let unread = loop {
        let answer = ask(&server, &unread).await;
        if answer.status == 429 && answer.json() == json!({ "message": "Too many requests" }) {
            break answer;
        }
        // A share that is not quite used up has the body read.
        assert!(matches!(answer.status, 100 | 400 | 429), "{answer:?}");
    };
    assert_eq!(unread.status, 429);
    assert!(server.metric(&limited("address_requests", "refused")).await >= 1.0);
    for _ in 0..40 {
        assert_eq!(broadcast(&server, &service, &[WINNER]).await.status, 202);
        viewer.hears(WINNER, json!({ "n": 1 })).await;
    }
    let envelope = json!({ "type": "broadcast", "event": "e", "payload": {} });
    for n in 0..8 {
        let n = n.to_string();
        talker.send(json!([talk, n, "realtime:room", "broadcast", envelope])).await;
        let ok = json!({ "status": "ok", "response": {} });
        talker.expect(json!([talk, n, "realtime:room", "phx_reply", ok])).await;
    }
    let mut newcomer = Client::with_token(&server, Serializer::V2, &person).await;
    newcomer.join("another room").await;
    for client in [viewer, talker, newcomer] {
        client.ends().await;
    }
    server.stop().await;
}

#[tokio::test]
async fn a_broadcast_is_rated_by_its_bytes_on_sockets_and_by_rest() {
    let server = server(|config| config.limits.broadcast_bytes_per_second_max = 1);
    let mut client = Client::connect(&server, Serializer::V2).await;
    let room = client.join_with("room", json!({ "broadcast": { "ack": true } })).await;
    let largest = "x".repeat(2_000_000);
    let envelope = json!({ "type": "broadcast", "event": "e", "payload": { "x": largest } });
    client.send(json!([room, "1", "realtime:room", "broadcast", envelope])).await;
    assert_eq!(client.message().await[4]["status"], "ok");
    client.send(json!([room, "2", "realtime:room", "broadcast", envelope])).await;
    client.expect_nothing().await;
    let dropped = limited("client_broadcast_bytes", "dropped");
    assert_eq!(server.metric(&dropped).await, 1.0);
    assert_eq!(server.metric("tidegate_dropped_total{reason=\"rate\"}").await, 1.0);
    let message = json!({ "topic": "room", "event": "e", "payload": { "x": largest } });
    let body = json!({ "messages": [message] }).to_string();
    let apikey = format!("apikey: {}", token::of_role("anon"));
    let answer = ask(&server, post(BATCH, &[&apikey], body)).await;
    let text = "You have exceeded your rate limit";
    assert_eq!((answer.status, answer.json()), (429, json!({ "message": text })));
    assert_eq!(server.metric(&limited("client_broadcast_bytes", "refused")).await, 1.0);
    client.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn requests_beyond_an_addresss_rate_are_refused_and_their_tokens_unread() {
    let server = server(|config| {
        trust_all(config);
        config.limits.requests_per_address_max = 1;
    });
    let (anon, service) = (token::of_role("anon"), token::of_role("service_role"));
    let venue = "x-forwarded-for: 192.0.2.1";
    let rest = async |key: &str, address: &str| {
        let apikey = format!("apikey: {key}");
        let body = json!({ "messages": [{ "topic": "t", "event": "e", "payload": {} }] });
        ask(&server, post(BATCH, &[&apikey, address], body.to_string())).await
    };
    assert_eq!(rest(&service, venue).await.status, 202);
    let mut read = 0.0;
    let over = loop {
        let answer = rest("garbage", venue).await;
        if answer.status != 401 {
            break answer;
        }
        read += 1.0;
    };
    assert_eq!((over.status, over.json()), (429, json!({ "message": "Too many requests" })));
    assert_eq!(server.metric("tidegate_tokens_total{result=\"malformed\"}").await, read);
    // What servers send does not wait for their neighbours, nor do others.
    for _ in 0..40 {
        assert_eq!(rest(&service, venue).await.status, 202);
    }
    assert_eq!(rest(&anon, "x-forwarded-for: 192.0.2.2").await.status, 202);
    server.stop().await;
}

/// A million bytes of whatever a client library would never send.
async fn expect_a_flood_to_be_slowed(flood: Vec<u8>) {
    let server = server(|config| {
        config.limits.socket_messages_per_second_max = 10;
        config.limits.socket_bytes_per_second_max = 1_000_000;
    });
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join(CACHE).await;
    let (answer, flooder) = knock(&server, &[]).await;
    assert_eq!(answer.status, 101);
    // As much as the system takes: the server does not read it all.
    let mut sent = 0;
    let flood = flood.repeat(1_000_000 / flood.len());
    let delayed = limited("socket_messages", "delayed");
    let until_delayed = async {
        while server.metric(&delayed).await < 1.0 {
            if let Ok(length) = flooder.try_write(flood.get(sent..).unwrap_or_default()) {
                sent += length;
            }
        }
    };
    assert!(timeout(DEADLINE, until_delayed).await.is_ok(), "it is read as fast as it comes");
    // Others are served meanwhile, and of the flood little more has been handled than is allowed.
    for _ in 0..20 {
        other.expect_nothing().await;
    }
    assert!(server.metric("tidegate_frames_total{direction=\"in\"}").await < 600.0);
    assert!(server.metric("tidegate_malformed_total{reason=\"not_json\"}").await < 600.0);
    assert_eq!(server.metric("tidegate_connections").await, 2.0, "and nobody is closed for it");
    other.ends().await;
    drop(flooder);
    server.stop().await;
}

#[tokio::test]
async fn a_flood_of_pings_is_read_slowly_and_holds_up_nobody_else() {
    expect_a_flood_to_be_slowed(frame(0x89, b"")).await;
}

/// The WebSocket library hides them.
#[tokio::test]
async fn a_flood_of_empty_fragments_is_read_slowly_and_holds_up_nobody_else() {
    let server_side_of_a_message = [frame(0x01, b""), frame(0x00, b"").repeat(10_000)].concat();
    expect_a_flood_to_be_slowed(server_side_of_a_message).await;
}

#[tokio::test]
async fn a_flood_of_tiny_messages_is_read_slowly_and_holds_up_nobody_else() {
    expect_a_flood_to_be_slowed(frame(0x81, b"")).await;
}

#[tokio::test]
async fn a_flood_of_bytes_is_read_slowly_and_holds_up_nobody_else() {
    let server = server(|config| {
        config.limits.socket_bytes_per_second_max = 1000;
        config.limits.message_bytes_max = 10_000;
    });
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join(CACHE).await;
    let mut flooder = Client::connect(&server, Serializer::V2).await;
    let message = frame(0x81, &[b'x'; 5000]);
    for _ in 0..20 {
        flooder.stream().write_all(&message).await.unwrap();
    }
    server.metric_reaches(&limited("socket_bytes", "delayed"), 1.0).await;
    other.expect_nothing().await;
    // 10,000 and 64 KiB at once; 25 s for the rest.
    assert!(server.metric("tidegate_malformed_total{reason=\"not_json\"}").await <= 16.0);
    other.ends().await;
    drop(flooder);
    server.stop().await;
}

/// Production clients give up what is answered with an error, and are deaf after a close.
#[tokio::test]
async fn a_viewer_over_every_limit_of_its_socket_is_served_all_the_same() {
    let server = server(|config| {
        config.limits.joins_per_second_max = 1;
        config.limits.broadcasts_per_second_max = 1;
        config.limits.socket_joins_per_second_max = 5;
        config.limits.socket_messages_per_second_max = 5;
        config.limits.socket_bytes_per_second_max = 1;
        config.limits.channels_per_socket_max = 1;
    });
    let mut viewer = Client::connect(&server, Serializer::V1).await;
    // Leaves and joins on and on, as one production page does.
    let mut n = 0;
    while n < 27 || server.metric(&limited("socket_messages", "delayed")).await < 1.0 {
        n += 1;
        viewer.join(CACHE).await;
        let leave = json!([null, n.to_string(), format!("realtime:{CACHE}"), "phx_leave", {}]);
        viewer.send(leave).await;
        assert_eq!(viewer.message().await[3], "phx_reply");
        assert_eq!(viewer.message().await[3], "phx_close");
    }
    viewer.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_message_that_is_not_finished_in_time_closes_with_1008() {
    let server = server(|config| config.limits.message_timeout = Duration::from_millis(300));
    let mut pinging = Client::connect(&server, Serializer::V2).await;
    let closed = "tidegate_connections_closed_total{code=\"1008\",reason=\"unfinished\"}";
    for (count, part, between) in [
        // Neither pings nor empty fragments between its parts make it a new one.
        (1.0, frame(0x01, b"[null,"), [frame(0x89, b"p"), frame(0x00, b"")].concat()),
        (2.0, frame(0x81, b"[null,\"1\",\"phoenix\",\"heartbeat\",{}]")[..9].to_vec(), Vec::new()),
        // What follows a whole message in its packet.
        (3.0, [frame(0x81, b"[]"), frame(0x81, b"[]")[..1].to_vec()].concat(), Vec::new()),
    ] {
        let mut slow = Client::connect(&server, Serializer::V2).await;
        slow.stream().write_all(&part).await.unwrap();
        // Who sends nothing but pings has begun none.
        let until_closed = async {
            while server.metric(closed).await < count {
                drop(slow.stream().write_all(&between).await);
                pinging.stream().write_all(&frame(0x89, b"p")).await.unwrap();
            }
        };
        assert!(timeout(DEADLINE, until_closed).await.is_ok(), "it is closed in time");
        drop(slow);
    }
    pinging.ends().await;
    server.stop().await;
}

#[tokio::test]
async fn a_page_of_another_origin_is_refused_before_its_key_is_looked_at() {
    let server = server(|config| {
        config.network.origins = ["https://app.example.com", "https://*.live.example.com"]
            .map(|origin| origin.parse().unwrap())
            .into();
    });
    for (origin, status) in [
        ("https://app.example.com", 101),
        ("https://a.live.example.com", 101),
        ("https://live.example.com", 403),
        ("https://evil.example", 403),
        ("http://app.example.com", 403),
        ("https://app.example.com.evil.example", 403),
        ("null", 403),
        ("", 403),
    ] {
        let (answer, _) = knock(&server, &[&format!("origin: {origin}")]).await;
        assert_eq!(answer.status, status, "{origin}");
    }
    // Not a browser.
    assert_eq!(knock(&server, &[]).await.0.status, 101);
    let (refused, _) = knock_with(&server, "garbage", &["origin: https://evil.example"]).await;
    assert_eq!((refused.status, &*refused.body), (403, ""));
    assert_eq!(server.metric("tidegate_connections_refused_total{reason=\"origin\"}").await, 7.0);
    assert_eq!(server.metric("tidegate_tokens_total{result=\"malformed\"}").await, 0.0);
    server.metric_falls_to("tidegate_connections", 0.0).await;
    server.stop().await;
}

#[tokio::test]
async fn only_a_listed_page_may_read_what_rest_answers() {
    let server = server(|config| {
        config.network.origins = vec!["https://app.example.com".parse().unwrap()];
    });
    let anon = format!("apikey: {}", token::of_role("anon"));
    let body = r#"{"messages":[{"topic":"t","event":"e","payload":{}}]}"#;
    for (origin, allowed) in [
        ("https://app.example.com", Some("https://app.example.com")),
        ("https://evil.example", None),
        ("null", None),
    ] {
        let origin = format!("origin: {origin}");
        let answer = ask(&server, post(BATCH, &[&anon, &origin], body)).await;
        assert_eq!(answer.status, 202);
        assert_eq!(answer.header("access-control-allow-origin"), allowed, "{origin}");
        assert_eq!(answer.header("vary"), Some("origin"));
        let preflight = format!("OPTIONS {BATCH} HTTP/1.1\r\nhost: test\r\n{origin}\r\n\r\n");
        let answer = ask(&server, preflight).await;
        assert_eq!(answer.header("access-control-allow-origin"), allowed, "{origin}");
        assert_eq!(answer.header("vary"), Some("origin"));
    }
    let answer = ask(&server, post(BATCH, &[&anon], body)).await;
    assert_eq!((answer.status, answer.header("access-control-allow-origin")), (202, None));
    server.stop().await;
}
