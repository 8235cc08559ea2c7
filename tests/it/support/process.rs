//! The binary, run as its users run it: a command that ends, or a server in a process of its own.

use std::{
    fs,
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{Output, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader},
    process::{Child, ChildStdout, Command},
    time::timeout,
};

use super::{server::DEADLINE, token::SECRET};

pub(crate) const BINARY: &str = env!("CARGO_BIN_EXE_tidegate");

/// Settings of a server that needs nothing else.
pub(crate) const SERVE: [(&str, &str); 3] = [
    ("TIDEGATE_LISTEN", "127.0.0.1:0"),
    ("TIDEGATE_ADMIN_LISTEN", "127.0.0.1:0"),
    ("TIDEGATE_JWT_SECRET", SECRET),
];

pub(crate) type Variables<'a> = &'a [(&'a str, &'a str)];

pub(crate) fn command(program: &str, arguments: &[&str], variables: Variables<'_>) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(variables.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    command
}

/// What a command that ends says.
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        assert_eq!(output.status.signal(), None, "ended by a signal");
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

/// Runs a command until it ends, with nothing in its environment but `variables`.
pub(crate) async fn run(arguments: &[&str], variables: Variables<'_>) -> Said {
    let output = timeout(DEADLINE, command(BINARY, arguments, variables).output()).await;
    output.expect("the command ends in time").unwrap().into()
}

/// A server in a process of its own.
pub(crate) struct Serving {
    pub(crate) child: Child,
    out: BufReader<ChildStdout>,
    pub(crate) public: SocketAddr,
    pub(crate) admin: SocketAddr,
}

impl Serving {
    pub(crate) async fn start(variables: Variables<'_>) -> Self {
        Self::spawn(command(BINARY, &["serve"], variables), variables).await
    }

    /// After a shell has run `prelude`, in the same process.
    pub(crate) async fn after(prelude: &str, variables: Variables<'_>) -> Self {
        let script = format!("{prelude} && exec \"$0\"");
        Self::spawn(command("/bin/sh", &["-c", &script, BINARY], variables), variables).await
    }

    async fn spawn(mut command: Command, variables: Variables<'_>) -> Self {
        command.envs(SERVE).envs(variables.iter().copied());
        let mut child = command.spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        timeout(DEADLINE, out.read_line(&mut line)).await.expect("it listens in time").unwrap();
        let addresses =
            line.strip_prefix("listening public=").and_then(|text| text.strip_suffix('\n'));
        let Some((public, admin)) = addresses.and_then(|text| text.split_once(" admin=")) else {
            let output = child.wait_with_output().await.unwrap();
            panic!("said {line:?}, then {}", String::from_utf8_lossy(&output.stderr));
        };
        let (public, admin) = (public.parse().unwrap(), admin.parse().unwrap());
        Self { child, out, public, admin }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().expect("it runs")).unwrap();
        kill(Pid::from_raw(pid), signal).unwrap();
    }

    /// Ends it by a signal, and gives what it has said since it listened.
    pub(crate) async fn end(mut self, signal: Signal) -> Said {
        self.signal(signal);
        self.ended().await
    }

    /// Waits until it has ended, and gives what it has said since it listened.
    pub(crate) async fn ended(&mut self) -> Said {
        let mut out = String::new();
        let read = timeout(DEADLINE, self.out.read_to_string(&mut out)).await;
        read.expect("it ends in time").unwrap();
        let mut err = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            stderr.read_to_string(&mut err).await.unwrap();
        }
        let status = timeout(DEADLINE, self.child.wait()).await;
        let status = status.expect("it ends in time").unwrap();
        assert_eq!(status.signal(), None, "ended by a signal");
        Said { code: status.code(), out, err }
    }
}

/// A file that is removed with this.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(text: &str) -> Self {
        let name = format!("tidegate-test-{:016x}.toml", fastrand::u64(..));
        let path = std::env::temp_dir().join(name);
        fs::write(&path, text).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    pub(crate) fn name(&self) -> &str {
        self.0.file_name().unwrap().to_str().unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_file(&self.0).unwrap();
    }
}
