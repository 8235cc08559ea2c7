//! The orderly end: everybody is told, nobody new is taken, nobody can hold it up.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tidegate::protocol::serializer::Serializer;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpSocket, TcpStream},
    task::JoinSet,
};

use crate::support::{
    client::Client,
    raw::{answer, send, until_end, upgrade},
    server::{TestServer, config, config_of_long_windows},
    token,
};

async fn drain(server: &TestServer) {
    let answer = TestServer::request(server.admin, "POST /drain HTTP/1.1", "").await;
    assert_eq!(answer.0, 202);
}

async fn readiness(server: &TestServer, query: &str) -> (u16, Value) {
    let head = format!("GET /readyz{query} HTTP/1.1");
    let (status, body) = TestServer::request(server.admin, &head, "").await;
    (status, serde_json::from_str(&body).unwrap())
}

#[tokio::test]
async fn a_drain_closes_every_socket_with_1012_and_ends_the_server() {
    let mut server = TestServer::start();
    let mut joined = Client::connect(&server, Serializer::V1).await;
    joined.join("room").await;
    let mut other = Client::connect(&server, Serializer::V2).await;
    other.join("room").await;
    let never_joined = Client::connect(&server, Serializer::V2).await;
    drain(&server).await;
    for client in [joined, other, never_joined] {
        assert_eq!(client.closed().await, Some(1012));
    }
    server.ended().await;
    let closed = "tidegate_connections_closed_total{code=\"1012\",reason=\"draining\"}";
    assert_eq!(server.count(closed), 3);
    for address in [server.public, server.admin] {
        assert!(TcpStream::connect(address).await.is_err(), "{address} listens no more");
    }
    server.stop().await;
}

/// What SIGTERM does in `main`.
#[tokio::test]
async fn the_end_of_the_shutdown_future_drains_as_well() {
    let server = TestServer::start();
    let mut client = Client::connect(&server, Serializer::V2).await;
    client.join("room").await;
    let mut clients = JoinSet::new();
    clients.spawn(client.closed());
    server.stop().await;
    assert_eq!(clients.join_all().await, [Some(1012)]);
}

/// Nobody would be told of it later: the next process has not heard it.
#[tokio::test]
async fn what_waits_for_its_window_is_sent_before_the_sockets_are_closed() {
    const CACHE: &str = "cache_invalidate_AB3028";
    let mut server = TestServer::start_with(config_of_long_windows());
    let mut client = Client::connect(&server, Serializer::V1).await;
    client.join(CACHE).await;
    for number in 1..=2 {
        let payload = json!({ "n": number, "endpoints": [format!("/{number}")] });
        let message = json!({ "topic": CACHE, "event": "cache_invalidation", "payload": payload });
        let head =
            format!("POST /api/broadcast HTTP/1.1\r\napikey: {}", token::of_role("service_role"));
        let body = json!({ "messages": [message] }).to_string();
        assert_eq!(TestServer::request(server.public, &head, &body).await.0, 202);
        if number == 1 {
            assert_eq!(client.broadcast().await.1["payload"], payload);
            client.repeated(CACHE, payload).await;
            continue;
        }
        client.expect_nothing().await;
        drain(&server).await;
        let (_, last) = client.broadcast().await;
        assert_eq!(last["payload"]["endpoints"], json!(["/2", "/1"]), "{last}");
    }
    assert_eq!(client.closed().await, Some(1012));
    server.ended().await;
    server.stop().await;
}

/// A socket on which nobody answers a close, and which so holds the drain up for a while.
async fn mute(server: &TestServer) -> TcpStream {
    let path = format!("/socket/websocket?apikey={}", token::of_role("anon"));
    let mut stream = send(server, upgrade(&path, &[])).await;
    assert_eq!(answer(&mut stream).await.status, 101);
    stream
}

#[tokio::test]
async fn while_it_drains_a_server_is_not_ready_and_refuses_upgrades() {
    let mut server = TestServer::start();
    assert_eq!(readiness(&server, "").await.0, 200);
    let mute = mute(&server).await;
    // Accepted before the drain, with its upgrade yet to come.
    let mut late = send(&server, "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert_eq!(answer(&mut late).await.status, 200);
    drain(&server).await;
    for query in ["", "?strict=1"] {
        let (status, body) = readiness(&server, query).await;
        assert_eq!(status, 503);
        assert_eq!((&body["ready"], &body["draining"]), (&json!(false), &json!(true)), "{body}");
    }
    let (status, _) = TestServer::request(server.admin, "GET /healthz HTTP/1.1", "").await;
    assert_eq!(status, 200, "it lives");
    assert_eq!(server.metric("tidegate_connections").await, 1.0, "it is observed to the end");
    // With a good key and with none: it is not the key's fault.
    for key in [token::of_role("anon"), String::new()] {
        let path = format!("/realtime/v1/websocket?vsn=2.0.0&apikey={key}");
        late.write_all(upgrade(&path, &[]).as_bytes()).await.unwrap();
        let refused = answer(&mut late).await;
        assert_eq!(refused.status, 503, "RealtimeRestarting");
        assert_eq!(refused.json(), json!({ "error": "Realtime is restarting, please standby" }));
    }
    let refused = "tidegate_connections_refused_total{reason=\"draining\"}";
    assert_eq!(server.metric(refused).await, 2.0);
    drop(mute);
    server.ended().await;
    server.stop().await;
}

#[tokio::test]
async fn only_a_post_drains() {
    let server = TestServer::start();
    for method in ["GET", "HEAD", "PUT", "DELETE"] {
        let (status, _) =
            TestServer::request(server.admin, &format!("{method} /drain HTTP/1.1"), "").await;
        assert_eq!(status, 404, "{method}");
    }
    let (status, _) = TestServer::request(server.public, "POST /drain HTTP/1.1", "").await;
    assert_eq!(status, 404, "not on the public port");
    assert_eq!(readiness(&server, "").await.0, 200);
    Client::connect(&server, Serializer::V2).await.ends().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_sockets_are_drained() {
    let server = TestServer::start();
    let mut connecting = JoinSet::new();
    let mut clients = JoinSet::new();
    for number in 0..300 {
        let mut client = Client::connect(&server, Serializer::V2).await;
        connecting.spawn(async move {
            client.join(&format!("t{}", number % 7)).await;
            client
        });
    }
    for client in connecting.join_all().await {
        clients.spawn(client.closed());
    }
    assert_eq!(server.metric("tidegate_connections").await, 300.0);
    assert_eq!(server.metric("tidegate_channels").await, 300.0);
    drain(&server).await;
    assert_eq!(clients.join_all().await, [Some(1012); 300]);
    server.stop().await;
}

/// Neither a peer that answers no close, nor one that reads nothing, nor a request that does not
/// come, nor a refusal that waits.
#[tokio::test]
async fn nobody_holds_a_drain_up_beyond_its_time() {
    let mut config = config();
    config.drain.timeout = Duration::from_millis(300);
    config.protocol.error_delay = Duration::from_millis(1500);
    config.limits.outbox_bytes_max = 1 << 24;
    let mut server = TestServer::start_with(config);
    let mute = mute(&server).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(server.public).await.unwrap();
    let mut deaf = Client::over(&server, stream, Serializer::V2, &token::of_role("anon")).await;
    deaf.join("room").await;
    // More than the system's buffers take: the write waits.
    for _ in 0..8 {
        server.publish("room", &json!({ "x": "x".repeat(1_000_000) })).await;
    }
    let refused = send(&server, upgrade("/socket/websocket?apikey=garbage", &[])).await;
    server.metric_reaches("tidegate_tokens_total{result=\"malformed\"}", 1.0).await;
    let idle = send(&server, "GET /healthz").await;
    let polite = Client::connect(&server, Serializer::V2).await;
    let began = Instant::now();
    drain(&server).await;
    assert_eq!(polite.closed().await, Some(1012));
    server.ended().await;
    // The mute one alone would be waited for two seconds, the deaf one ten.
    assert!(began.elapsed() < Duration::from_millis(1900), "{:?}", began.elapsed());
    drop((mute, deaf, refused, idle));
}

#[tokio::test]
async fn requests_that_idle_do_not_hold_a_drain_up_at_all() {
    let server = TestServer::start();
    let mut idle = send(&server, []).await;
    let mut half = send(&server, "GET /healthz HTTP/1.1\r\nhost").await;
    let mut kept = send(&server, "GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n").await;
    assert_eq!(answer(&mut kept).await.body, "ok");
    let began = Instant::now();
    server.stop().await;
    for stream in [&mut idle, &mut half, &mut kept] {
        until_end(stream).await;
    }
    // A head may take five seconds.
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
}
