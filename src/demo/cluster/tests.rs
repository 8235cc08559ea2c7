//! A cluster is reached, outlives stops, and leaves nothing, however its process ends.

use std::{future::Future, sync::Arc};

use tokio::time::Instant;

use super::{
    super::supervisor::{LOG_INTERVAL, PATIENCE},
    *,
};

/// Waits for something that leaves no event behind, such as a directory's end.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        tokio::time::sleep(LOG_INTERVAL).await;
    }
}

fn on_a_runtime_of_its_own<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(future)
}

#[tokio::test]
async fn a_cluster_is_reached_by_tcp_socket_and_psql_and_leaves_nothing() {
    let cluster = Cluster::start().await.unwrap();
    let name = r#"a name/with "quotes"#;
    cluster.create_database(name).await.unwrap();
    let rows = "create table t (a int, b text); insert into t values (1, 'x'), (2, null);
        select * from t order by a";
    assert_eq!(cluster.psql(name, rows).await.unwrap(), "1|x\n2|");
    for url in [cluster.url(name), cluster.socket_url(name)] {
        use sqlx::Connection as _;
        let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
        let count = sqlx::query_scalar("select count(*) from t");
        let count: i64 = count.fetch_one(&mut connection).await.unwrap();
        assert_eq!(count, 2, "{url}");
    }
    let wrong = cluster.psql(name, "select 1; selec 2; drop table t").await.unwrap_err();
    assert!(wrong.to_string().contains("syntax error"), "{wrong}");
    let missing = cluster.psql_file(name, Path::new("/no/such/file")).await.unwrap_err();
    assert!(missing.to_string().contains("No such file"), "{missing}");
    assert!(cluster.create_database(name).await.is_err());

    let directory = cluster.dir.clone();
    let port = cluster.port();
    assert!(cluster.data_dir().join("PG_VERSION").exists());
    drop(cluster);
    assert!(!directory.exists());
    assert!(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok());
}

#[test]
fn a_commit_outlives_an_immediate_stop_and_any_runtime() {
    let cluster = Arc::new(on_a_runtime_of_its_own(Cluster::start()).unwrap());
    let port = cluster.port();
    on_a_runtime_of_its_own(async {
        cluster.psql("postgres", "create table t (a int); insert into t values (7)").await.unwrap();
        cluster.stop_immediate().await.unwrap();
        cluster.psql("postgres", "select 1").await.unwrap_err();
        // Stopped already, so that there is nothing to do.
        cluster.stop_immediate().await.unwrap();
    });
    on_a_runtime_of_its_own(async {
        cluster.restart().await.unwrap();
        assert_eq!(cluster.psql("postgres", "select a from t").await.unwrap(), "7");
        // Running, so that it is stopped first.
        cluster.restart().await.unwrap();
        assert_eq!(cluster.psql("postgres", "select a from t").await.unwrap(), "7");
    });
    assert_eq!(cluster.port(), port);
}

#[tokio::test]
async fn a_port_that_was_taken_is_named_and_may_become_free_again() {
    let cluster = Cluster::start().await.unwrap();
    cluster.stop_immediate().await.unwrap();
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, cluster.port())).unwrap();
    let error = cluster.restart().await.unwrap_err().to_string();
    assert!(error.contains("could not bind"), "{error}");
    drop(taken);
    cluster.restart().await.unwrap();
    assert_eq!(cluster.psql("postgres", "select 1").await.unwrap(), "1");
}

/// The name under which the next test runs itself as the process to be killed.
const VICTIM: &str = "TIDEGATE_TEST_CLUSTER_VICTIM";

#[expect(clippy::disallowed_methods, reason = "how the test tells its own copy what to do")]
#[tokio::test]
async fn a_killed_process_leaves_neither_postgres_nor_files() {
    if let Some(told) = std::env::var_os(VICTIM) {
        let cluster = Cluster::start().await.unwrap();
        let pid = fs::read_to_string(cluster.data_dir().join("postmaster.pid")).unwrap();
        let pid = pid.lines().next().unwrap();
        fs::write(&told, format!("{pid}\n{}\n", cluster.dir.display())).unwrap();
        std::future::pending::<()>().await;
    }
    let told = tempfile_path();
    let name = concat!(module_path!(), "::a_killed_process_leaves_neither_postgres_nor_files");
    let name = name.split_once("::").map_or(name, |(_, name)| name);
    let mut victim = Command::new(std::env::current_exe().unwrap());
    victim.args(["--exact", name]).env(VICTIM, &told).stdout(Stdio::null());
    let mut victim = victim.stderr(Stdio::null()).spawn().unwrap();
    let complete = || fs::read_to_string(&told).is_ok_and(|text| text.ends_with('\n'));
    eventually("the victim's start", complete).await;
    let text = fs::read_to_string(&told).unwrap();
    fs::remove_file(&told).unwrap();
    let (pid, directory) = text.trim_end().split_once('\n').unwrap();
    let pid = nix::unistd::Pid::from_raw(pid.parse().unwrap());
    assert!(nix::sys::signal::kill(pid, None).is_ok());

    victim.kill().unwrap();
    victim.wait().unwrap();
    eventually("the directory's end", || !Path::new(directory).exists()).await;
    assert!(nix::sys::signal::kill(pid, None).is_err());
}

fn tempfile_path() -> PathBuf {
    std::env::temp_dir().join(format!("tidegate-victim-{}", fastrand::u64(..)))
}
