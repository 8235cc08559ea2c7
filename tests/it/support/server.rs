//! A server of the test's own, in the test's process, on ports of the system's choice.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tidegate::{
    access::Rule,
    secret::Secret,
    server::{Config, Gateway, Server},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::oneshot,
    task::JoinSet,
    time::timeout,
};

use super::token::{SECRET, of_role};

/// How long anything may take that is expected to happen.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// A running server.
pub(crate) struct TestServer {
    pub(crate) public: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) gateway: Arc<Gateway>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinSet<()>,
}

/// The settings of a test: ports of the system's choice, short delays.
pub(crate) fn config() -> Config {
    let mut config = Config::defaults();
    config.listen = "127.0.0.1:0".parse().unwrap();
    config.admin_listen = "127.0.0.1:0".parse().unwrap();
    config.jwt_secret = Secret::from(SECRET);
    config.protocol.error_delay = Duration::from_millis(5);
    // A token ends in its second, as in the recorded conversations.
    config.auth.leeway = Duration::ZERO;
    config.auth.grace = Duration::ZERO;
    config.relay.backoff_max = Duration::from_millis(200);
    // Most tests have no table of events that could say which of them everybody may know.
    for rule in &mut config.topic {
        rule.listed = true;
    }
    // All tests have one address, and some are fast; what limits rates has tests of its own.
    config.limits.handshakes_per_address_max = 0;
    config.limits.failures_per_address_max = 0;
    config.limits.joins_per_second_max = 0;
    config.limits.broadcasts_per_second_max = 0;
    config.limits.broadcast_bytes_per_second_max = 0;
    config.limits.server_broadcasts_per_second_max = 0;
    config.limits.requests_per_address_max = 0;
    config.limits.socket_joins_per_second_max = 0;
    config.limits.socket_messages_per_second_max = 0;
    config.limits.socket_bytes_per_second_max = 0;
    config
}

/// The settings of a test, with windows and repeats that outlast it, however slow the machine is.
pub(crate) fn config_of_long_windows() -> Config {
    let mut config = config();
    let merge = config.topic[0].merge.as_mut().unwrap();
    merge.window = Duration::from_secs(600);
    merge.carry = Duration::from_secs(600);
    config
}

/// A rule that relays what the database notifies as it comes: nothing is merged, and who joins is
/// not caught up.
pub(crate) fn plain_rule() -> Rule {
    let rule = r#"
        name = "plain"
        pattern = ["plain_{eid}", "plain:{eid}"]
        listen = "plain_{eid}"
        event = "news"
        read = [{ role = ["anon", "authenticated", "service_role"] }]
        write = [{ role = ["service_role"] }]
    "#;
    toml::from_str(rule).unwrap()
}

/// The value of a series that is counted, without a scrape.
pub(crate) fn counted(gateway: &Gateway, series: &str) -> u64 {
    let text = String::from_utf8(gateway.registry.render()).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no series {series}")).parse().unwrap()
}

impl TestServer {
    /// With the built-in rules and without a database.
    pub(crate) fn start() -> Self {
        Self::start_with(config())
    }

    /// With these settings.
    pub(crate) fn start_with(config: Config) -> Self {
        Self::of(Server::bind(config).unwrap())
    }

    /// Runs this server.
    pub(crate) fn of(server: Server) -> Self {
        let (public, admin) = server.addresses().unwrap();
        let gateway = Arc::clone(server.gateway());
        let (stop, stopped) = oneshot::channel();
        let mut task = JoinSet::new();
        task.spawn(server.run(async { drop(stopped.await) }));
        Self { public, admin, gateway, stop: Some(stop), task }
    }

    /// The value of a series that is counted, without a scrape.
    pub(crate) fn count(&self, series: &str) -> u64 {
        counted(&self.gateway, series)
    }

    /// Drains, and fails if a socket, a channel or a topic is left.
    pub(crate) async fn stop(mut self) {
        drop(self.stop.take());
        self.ended().await;
        assert_eq!(self.gateway.hub.topic_count(), 0, "topics are left");
        assert_eq!(self.count("tidegate_channels"), 0, "channels are left");
        assert_eq!(self.count("tidegate_connections"), 0, "connections are left");
    }

    /// Waits until the server has drained; something has asked it to.
    pub(crate) async fn ended(&mut self) {
        timeout(DEADLINE, self.task.join_next()).await.expect("the server drains in time");
    }

    /// Broadcasts this payload as `service_role`, over HTTP.
    pub(crate) async fn publish(&self, sub_topic: &str, payload: &Value) {
        let token = of_role("service_role");
        let head = format!("POST /api/broadcast HTTP/1.1\r\napikey: {token}");
        let message = json!({ "topic": sub_topic, "event": "e", "payload": payload });
        let body = json!({ "messages": [message] }).to_string();
        assert_eq!(Self::request(self.public, &head, &body).await, (202, String::new()));
    }

    /// One request over a connection of its own: status and body.
    pub(crate) async fn request(address: SocketAddr, head: &str, body: &str) -> (u16, String) {
        let request = format!(
            "{head}\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = Self::raw(address, request.as_bytes()).await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, body.to_owned())
    }

    /// What the server says to these bytes, after which nothing comes, until it closes the connection.
    pub(crate) async fn raw_half(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        // It may have said no before it has read everything.
        drop(stream.write_all(bytes).await);
        drop(stream.shutdown().await);
        let mut answer = Vec::new();
        let read = timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "the server closes in time");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// What the server says to these bytes until it closes the connection.
    pub(crate) async fn raw(address: SocketAddr, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        let mut answer = Vec::new();
        // A reset after the answer is the server's right: we may not have read its close yet.
        let read = timeout(DEADLINE, stream.read_to_end(&mut answer)).await;
        assert!(read.is_ok(), "the server closes in time");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// The value of a series, as `/metrics` shows it: `tidegate_joins_total{code="",result="ok"}`.
    pub(crate) async fn metric(&self, series: &str) -> f64 {
        let (status, text) = Self::request(self.admin, "GET /metrics HTTP/1.1", "").await;
        assert_eq!(status, 200);
        text.lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_else(|| panic!("no series {series}"))
    }

    /// Waits until a series has reached `value`.
    pub(crate) async fn metric_reaches(&self, series: &str, value: f64) {
        let reached = async {
            // Each look is an exchange with the server, so this does not spin.
            while self.metric(series).await < value {}
        };
        if timeout(DEADLINE, reached).await.is_err() {
            panic!("{series} is {} and not {value}", self.metric(series).await);
        }
    }

    /// Waits until a series has come down to `value`.
    pub(crate) async fn metric_falls_to(&self, series: &str, value: f64) {
        let fallen = async { while self.metric(series).await > value {} };
        if timeout(DEADLINE, fallen).await.is_err() {
            panic!("{series} is {} and not {value}", self.metric(series).await);
        }
    }

    /// Waits until the listening session is up.
    pub(crate) async fn link_is_up(&self) {
        self.metric_reaches("tidegate_relay_link_up", 1.0).await;
    }
}
