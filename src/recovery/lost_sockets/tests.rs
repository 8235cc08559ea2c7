//! Tests of what is remembered of lost sockets, and when it is believed.

use std::net::IpAddr;

use super::*;

const SILENCE: Duration = Duration::from_secs(90);

/// Who has this address in 10.0.0.0/24, and this browser.
fn browser(address: u8, agent: usize) -> ClientKey {
    ClientKey::new(IpAddr::from([10, 0, 0, address]).into(), &format!("browser {agent}"))
}

fn client(address: u8) -> ClientKey {
    browser(address, 0)
}

fn alone_within(bounds: Bounds) -> LostSockets {
    let lost = LostSockets::new(bounds, SILENCE);
    lost.set_alone(true);
    lost
}

fn alone() -> LostSockets {
    alone_within(Bounds { all: 9, of_address: 9, of_record: 9 })
}

/// Loses a topic whose event nobody knows.
fn lose(lost: &LostSockets, client: ClientKey, topic: &str) {
    lose_of(lost, client, topic, false);
}

fn lose_of(lost: &LostSockets, client: ClientKey, topic: &str, is_known: bool) {
    let last_data = Some(Instant::now());
    lost.record(client, Loss { topic, event: Some(topic.into()), is_known, last_data });
}

fn topics(lost: &LostSockets, client: ClientKey) -> Vec<Arc<str>> {
    let mut topics = lost.topics(client.record(), None);
    topics.sort_unstable();
    topics
}

fn sound(lost: &LostSockets) {
    let state = lost.state.lock();
    let count: usize = state.records.values().map(|record| record.topics.len()).sum();
    let of_addresses: usize = state.places_of.values().map(BTreeSet::len).sum();
    let of_own = state.records.values().filter(|record| record.address.is_some());
    let own: usize = of_own.map(|record| record.topics.len()).sum();
    assert_eq!((state.places.len(), of_addresses), (count, own));
    for (event, records) in &state.events {
        for record in records {
            let mut topics = state.records[record].topics.values();
            assert!(topics.any(|lost| lost.event.as_ref() == Some(event)), "{event}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn of_several_sockets_the_longest_absence_counts() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone();
    let first = Instant::now();
    lose(&lost, client(1), "t");
    tokio::time::advance(Duration::from_secs(600)).await;
    lose(&lost, client(1), "t");
    assert_eq!(lost.since(client(1), "t"), Some(first - SLACK));
    assert_eq!(lost.since(client(1), "other"), None);
    assert_eq!(lost.since(client(2), "t"), None);
    sound(&lost);
}

#[tokio::test(start_paused = true)]
async fn a_socket_whose_death_is_not_noticed_yet_is_reckoned_with() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone();
    lose(&lost, client(1), "t");
    assert_eq!(lost.since(client(1), "t"), Some(Instant::now() - SILENCE - SLACK));
}

#[tokio::test(start_paused = true)]
async fn a_record_holds_for_a_day() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone();
    lose(&lost, client(1), "t");
    tokio::time::advance(REMEMBERED - Duration::from_secs(1)).await;
    assert!(lost.since(client(1), "t").is_some());
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(lost.since(client(1), "t"), None);
    lost.sweep();
    assert!(topics(&lost, client(1)).is_empty());
    assert!(!lost.has_event("t"));
    sound(&lost);
}

/// Whatever one address does, the others' records stay and are believed.
#[tokio::test(start_paused = true)]
async fn one_address_pushes_out_nobodys_records_but_its_own() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone_within(Bounds { all: 9, of_address: 4, of_record: 2 });
    lose(&lost, client(1), "t");
    for agent in 0..100 {
        tokio::time::advance(Duration::from_millis(1)).await;
        for topic in ["a", "b", "c"] {
            lose_of(&lost, browser(2, agent), &format!("{topic}{agent}"), true);
        }
    }
    assert!(lost.since(client(1), "t").is_some());
    assert_eq!(lost.records().iter().filter(|record| !record.topic.is_empty()).count(), 5);
    // What has made room for its last record may be missed by any of its own clients.
    lose(&lost, browser(2, 100), "t");
    assert_eq!(lost.since(browser(2, 100), "t"), None);
    sound(&lost);
}

#[tokio::test(start_paused = true)]
async fn a_record_with_too_many_topics_keeps_the_latest_and_is_not_believed_for_a_day() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone_within(Bounds { all: 9, of_address: 9, of_record: 2 });
    for topic in ["a", "b", "c"] {
        lose(&lost, client(1), topic);
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(topics(&lost, client(1)), ["b".into(), "c".into()]);
    assert_eq!(lost.since(client(1), "c"), None);
    lose(&lost, browser(1, 1), "c");
    assert!(lost.since(browser(1, 1), "c").is_some());
    tokio::time::advance(REMEMBERED).await;
    lose(&lost, client(1), "c");
    assert!(lost.since(client(1), "c").is_some());
    sound(&lost);
}

/// Anybody can lose a thousand events that do not exist.
#[tokio::test(start_paused = true)]
async fn the_oldest_of_what_nobody_knows_goes_first() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone_within(Bounds { all: 3, of_address: 3, of_record: 3 });
    lose_of(&lost, client(1), "known", true);
    for address in 2..100 {
        tokio::time::advance(Duration::from_secs(1)).await;
        lose(&lost, client(address), "t");
    }
    assert!(lost.since(client(1), "known").is_some());
    assert!(lost.since(client(99), "t").is_some());
    assert!(lost.since(client(98), "t").is_some());
    assert_eq!(topics(&lost, client(97)), []);
    for address in 100..104 {
        lose_of(&lost, client(address), "known", true);
        tokio::time::advance(Duration::from_secs(1)).await;
    }
    assert_eq!(topics(&lost, client(1)), []);
    // It was forgotten once, and may have been away for longer than the next record says.
    lose_of(&lost, client(1), "known", true);
    assert_eq!(lost.since(client(1), "known"), None);
    assert_eq!(lost.of_event("known").len(), 3);
    sound(&lost);
}

/// A process that takes over believes no more than the one before.
#[tokio::test(start_paused = true)]
async fn what_was_forgotten_is_left_to_other_gateways_with_the_records() {
    tokio::time::advance(REMEMBERED).await;
    let before = alone_within(Bounds { all: 9, of_address: 3, of_record: 2 });
    for (agent, topics) in [(0, &["a", "b", "c"][..]), (1, &["a"]), (2, &["a"]), (3, &["a", "b"])] {
        for topic in topics {
            lose(&before, browser(1, agent), topic);
            tokio::time::advance(Duration::from_secs(1)).await;
        }
    }
    lose(&before, browser(2, 0), "a");
    let after = alone();
    for Record { client, topic, age } in before.records() {
        let last_data = Instant::now().checked_sub(age);
        let loss = Loss { topic: &topic, event: None, is_known: false, last_data };
        after.take_over(client, loss);
    }
    for agent in 0..4 {
        lose(&after, browser(1, agent), "a");
        assert_eq!(after.since(browser(1, agent), "a"), None, "{agent}");
    }
    assert!(after.since(browser(2, 0), "a").is_some());
    sound(&after);
}

#[tokio::test(start_paused = true)]
async fn where_it_is_not_known_what_was_forgotten_none_is_believed() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone();
    lose(&lost, client(1), "t");
    for _ in 0..FORGOTTEN_MAX {
        lost.state.lock().mark(Uuid::new_v4());
    }
    assert!(lost.since(client(1), "t").is_some());
    assert!(!lost.has_overflowed());
    lost.state.lock().mark(Uuid::new_v4());
    assert_eq!(lost.since(client(1), "t"), None);
    assert!(lost.has_overflowed());
}

#[tokio::test(start_paused = true)]
async fn beside_another_gateway_none_is_believed() {
    tokio::time::advance(REMEMBERED).await;
    let lost = alone();
    lose(&lost, client(1), "t");
    lost.set_alone(false);
    assert_eq!(lost.since(client(1), "t"), None);
}
