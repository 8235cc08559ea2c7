//! A browser's page without a network: a socket in memory, and a world in which time can be made
//! to pass.

use std::{collections::VecDeque, net::IpAddr, sync::Arc, time::Duration};

use serde_json::{Value, json};
use tidegate::{
    clock::unix_now,
    db,
    hub::{
        OutboxBounds,
        outbox::{Drained, Notice, Outbox},
    },
    protocol::serializer::Serializer::V1,
    recovery::ClientKey,
    secret::Secret,
    server::{Config, Gateway},
    socket::Socket,
};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_tungstenite::tungstenite::Message as Frame;

use super::{
    client,
    postgres::Database,
    server::{DEADLINE, TestServer, config},
    token,
};

/// What the longest wait of a socket for its next tick may be.
const TICK_MAX: Duration = Duration::from_secs(24 * 3600);

/// More than it takes from a timer to a frame.
const TURNS: usize = 32;

/// Who has this address in 10.0.0.0/24 and the same browser as all others.
pub(crate) fn browser(address: u8) -> ClientKey {
    ClientKey::new(IpAddr::from([10, 0, 0, address]).into(), "Mozilla/5.0")
}

/// Lets so much time pass at once, for the gateway too, where the clock is not paused. What waits
/// for an answer of another process meanwhile must be given days to wait.
pub(crate) async fn jump(by: Duration) {
    tokio::time::pause();
    tokio::time::advance(by).await;
    tokio::time::resume();
}

/// One page and its socket, which speaks V1.
pub(crate) struct Page {
    socket: Socket,
    outbox: Arc<Outbox>,
    arrived: VecDeque<Frame>,
    pub(crate) opened: Instant,
}

impl Page {
    /// Opens a socket with the anon key.
    pub(crate) fn open(gateway: &Arc<Gateway>, client: ClientKey) -> Self {
        Self::with_token(gateway, client, &token::of_role("anon"))
    }

    /// Opens a socket with this token.
    pub(crate) fn with_token(gateway: &Arc<Gateway>, client: ClientKey, token: &str) -> Self {
        Self::reading(gateway, client, token, 1 << 20)
    }

    /// Opens a socket with the anon key, for which only so many bytes may wait. It reads when it is
    /// looked at, and not before.
    pub(crate) fn slow(gateway: &Arc<Gateway>, client: ClientKey, bytes_max: usize) -> Self {
        Self::reading(gateway, client, &token::of_role("anon"), bytes_max)
    }

    fn reading(gateway: &Arc<Gateway>, client: ClientKey, token: &str, bytes_max: usize) -> Self {
        let token = gateway.auth.verify_at(token, unix_now()).unwrap();
        let outbox = Arc::new(Outbox::new(V1, &OutboxBounds::new(bytes_max, usize::MAX)));
        let socket = Socket::new(
            Arc::clone(&gateway.socket),
            Arc::clone(&outbox),
            token,
            client,
            client::caller(),
        );
        Self { socket, outbox, arrived: VecDeque::new(), opened: Instant::now() }
    }

    /// Sends a message in the form of V2.
    pub(crate) async fn send(&mut self, message: Value) {
        let frame = Frame::text(client::encode(V1, &message));
        self.socket.handle([V1.decode(frame).unwrap()]).await;
    }

    /// Sends a join with this ref, and no token.
    pub(crate) async fn ask(&mut self, reference: &str, sub_topic: &str) {
        let topic = format!("realtime:{sub_topic}");
        self.send(json!([reference, reference, topic, "phx_join", { "config": {} }])).await;
    }

    /// Joins with this ref and expects `ok`; what else the gateway says is yet to be read.
    pub(crate) async fn join(&mut self, reference: &str, sub_topic: &str) {
        self.ask(reference, sub_topic).await;
        self.expect_ok(reference, sub_topic).await;
    }

    /// Fails unless the answer to a message with this ref comes next, and is `ok`.
    pub(crate) async fn expect_ok(&mut self, reference: &str, sub_topic: &str) {
        let message = self.message().await;
        let topic = format!("realtime:{sub_topic}");
        let said = (&message[1], &message[2], &message[3], &message[4]["status"]);
        let expected = (&json!(reference), &json!(topic), &json!("phx_reply"), &json!("ok"));
        assert_eq!(said, expected, "{message}");
    }

    /// Leaves the channel that was joined with this ref.
    pub(crate) async fn leave(&mut self, join_ref: &str, sub_topic: &str) {
        let topic = format!("realtime:{sub_topic}");
        self.send(json!([join_ref, "leave", topic, "phx_leave", {}])).await;
        self.expect_ok("leave", sub_topic).await;
        assert_eq!(self.message().await[3], "phx_close");
    }

    /// Sends a heartbeat, and expects that nothing comes before its answer, nor anything that the
    /// gateway's own tasks have to say by then.
    pub(crate) async fn expect_nothing(&mut self) {
        // Each turn fires the timers that are due, and runs what they wake.
        for _ in 0..TURNS {
            tokio::task::yield_now().await;
        }
        self.send(json!([null, "beat", "phoenix", "heartbeat", {}])).await;
        let message = self.message().await;
        assert_eq!((&message[1], &message[3]), (&json!("beat"), &json!("phx_reply")), "{message}");
    }

    /// The next message, in the form of V2 without `join_ref`.
    pub(crate) async fn message(&mut self) -> Value {
        self.message_until(Instant::now() + DEADLINE).await.expect("a message in time")
    }

    /// The next message, if one comes until then.
    pub(crate) async fn message_until(&mut self, until: Instant) -> Option<Value> {
        loop {
            if let Some(frame) = self.arrived.pop_front() {
                return Some(client::decode(V1, frame.to_text().unwrap()));
            }
            let mut batch = VecDeque::new();
            let tick = Instant::now() + self.socket.next_tick(TICK_MAX);
            tokio::select! {
                biased;
                drained = self.outbox.drain(&mut batch) => match drained.unwrap() {
                    Drained::Frames(_) => {
                        self.arrived.extend(batch.into_iter().map(|queued| queued.frame));
                    }
                    Drained::Behind(replaceable) => self.socket.conflate(replaceable),
                    Drained::Notice(Notice::Nudged) => self.socket.review(),
                    Drained::Notice(Notice::Overflowed(topic)) => self.socket.overflowed(topic),
                },
                due = self.socket.due() => self.socket.answer(due).await,
                () = sleep_until(tick) => self.socket.tick(),
                () = sleep_until(until) => return None,
            }
        }
    }

    /// The next message, which is an invalidation: its topic without `realtime:`, its payload.
    pub(crate) async fn told(&mut self) -> (String, Value) {
        let message = self.message().await;
        let envelope = &message[4];
        let said = (&message[3], &envelope["type"], &envelope["event"]);
        let broadcast = json!("broadcast");
        assert_eq!(said, (&broadcast, &broadcast, &json!("cache_invalidation")), "{message}");
        let topic = message[2].as_str().unwrap().strip_prefix("realtime:").unwrap();
        (topic.to_owned(), envelope["payload"].clone())
    }

    /// The next message, which is a catch-up: its cause, its endpoints.
    pub(crate) async fn caught_up(&mut self) -> (String, Vec<String>) {
        let (topic, payload) = self.told().await;
        let mut fields: Vec<_> = payload.as_object().unwrap().keys().map(String::as_str).collect();
        fields.sort_unstable();
        assert_eq!(fields, ["cause", "endpoints", "event_eid", "timestamp", "type"], "{payload}");
        assert_eq!(payload["type"], "catch_up");
        let eid = topic.strip_prefix("cache_invalidate").unwrap().trim_start_matches(['_', ':']);
        assert_eq!(payload["event_eid"], eid);
        assert!(payload["timestamp"].is_f64(), "{payload}");
        (payload["cause"].as_str().unwrap().to_owned(), endpoints(&payload))
    }
}

/// The list of an invalidation's payload.
pub(crate) fn endpoints(payload: &Value) -> Vec<String> {
    serde_json::from_value(payload["endpoints"].clone()).unwrap()
}

/// The event of [`World`], as its watcher has joined it.
pub(crate) const TOPIC: &str = "cache_invalidate_AB3028";
/// Longer than anything that is said is said again.
pub(crate) const QUIET: Duration = Duration::from_secs(6);
/// Longer than a socket may be silent, and a minute.
const HEARD: Duration = Duration::from_secs(200);
/// Between two looks of a gateway at the others.
pub(crate) const LOOK: Duration = Duration::from_secs(600);

/// A gateway and its database, days of which can pass at once.
pub(crate) struct World {
    pub(crate) server: TestServer,
    pub(crate) database: Database,
    /// Has joined [`TOPIC`] and reads what it is sent.
    pub(crate) watcher: Page,
}

/// Settings with which nothing is given up because time has jumped.
pub(crate) fn patient(database: &Database) -> Config {
    let (mut config, days) = (config(), Duration::from_secs(10 * 24 * 3600));
    config.database_url = Secret::from(database.url());
    let relay = &mut config.relay;
    relay.canary_interval = LOOK;
    for wait in [
        &mut relay.linger,
        &mut relay.heartbeat_interval,
        &mut relay.heartbeat_timeout,
        &mut relay.connect_timeout,
        &mut relay.canary_timeout,
    ] {
        *wait = days;
    }
    config
}

impl World {
    /// A gateway that is alone with its database, and a watcher, so much later that what anybody may
    /// have missed since has been heard.
    pub(crate) async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    /// With other settings.
    pub(crate) async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        Self::start_with_token(change, "anon").await
    }

    /// With other settings, and a watcher of this role.
    pub(crate) async fn start_with_token(change: impl FnOnce(&mut Config), role: &str) -> Self {
        Self::start_on(Database::create().await, change, role).await
    }

    /// On this empty database.
    pub(crate) async fn start_on(
        mut database: Database,
        change: impl FnOnce(&mut Config),
        role: &str,
    ) -> Self {
        db::migrate(&Secret::from(database.url())).await.unwrap();
        let mut config = patient(&database);
        change(&mut config);
        database.run(EXPIRED).await;
        let server = TestServer::start_with(config);
        server.link_is_up().await;
        has_looked(&mut database).await;
        let token = token::of_role(role);
        let mut watcher = Page::with_token(&server.gateway, browser(250), &token);
        watcher.join("1", TOPIC).await;
        watcher.caught_up().await;
        jump(HEARD).await;
        Self { server, database, watcher }
    }

    /// The next gateway on the database, which has looked at what others have left.
    pub(crate) async fn restart(database: &mut Database) -> TestServer {
        database.run(EXPIRED).await;
        let server = TestServer::start_with(patient(database));
        server.link_is_up().await;
        has_looked(database).await;
        server
    }

    /// Changes an endpoint, of which the watcher then knows; six seconds later.
    pub(crate) async fn change(&mut self, endpoint: &str) {
        let payload = json!({ "type": "t", "endpoints": [endpoint] });
        self.database.notify(TOPIC, &payload.to_string()).await;
        assert_eq!(self.watcher.told().await, (TOPIC.to_owned(), payload));
        jump(QUIET).await;
    }

    /// Lets the time pass until the gateway looks at the others, and waits until it has.
    pub(crate) async fn look(&mut self) {
        self.database.run(EXPIRED).await;
        jump(LOOK).await;
        has_looked(&mut self.database).await;
    }

    /// Ends the watcher and the gateway.
    pub(crate) async fn stop(self) {
        drop(self.watcher);
        self.server.stop().await;
    }
}

/// A row of the history that a gateway deletes right after it has looked at the others.
const EXPIRED: &str = "insert into tidegate.broadcast_history (eid, endpoints, payload, at)
    values ('expired', '{}', '{}', now() - interval '100 hours')";

async fn has_looked(database: &mut Database) {
    let is_left = "select exists (select from tidegate.broadcast_history where eid = 'expired')";
    let gone = async { while database.value::<bool>(is_left).await {} };
    timeout(DEADLINE, gone).await.expect("the gateway looks at the others, then at the history");
}
