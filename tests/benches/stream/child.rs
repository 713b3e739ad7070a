//! Processes of this program: what they are told and say, a line each, and what they use.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{self, ChildStdin, ChildStdout, Command, Stdio};

/// A process of this program.
pub(crate) struct Child {
    process: process::Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Usage {
    pub(crate) cpu_seconds: f64,
    pub(crate) rss_peak_mib: f64,
}

impl Child {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(arguments);
        Self::of(&mut command)
    }

    /// The same, however it is started.
    pub(crate) fn of(command: &mut Command) -> Self {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, from) = (process.stdin.take(), process.stdout.take().unwrap());
        Self { process, to, from: BufReader::new(from) }
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.to.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn hear(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "a process of the benchmark ended; what it said is above");
        line.trim_end().to_owned()
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Kills it with SIGKILL. It is gone when this returns.
    pub(crate) fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    pub(crate) fn usage(&self) -> Usage {
        let proc =
            |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", self.process.id())).unwrap();
        let stat = proc("stat");
        // Behind the name, which may hold anything: fields 14 and 15, in ticks.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: f64 = fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap()).sum();
        let status = proc("status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let kib: f64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
        let per_second = f64::from(u32::try_from(rustix::param::clock_ticks_per_second()).unwrap());
        Usage { cpu_seconds: ticks / per_second, rss_peak_mib: kib / 1024.0 }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It ends when nobody tells it anything any more.
        drop(self.to.take());
        let _ = self.process.wait();
    }
}

/// In a child: says a line.
pub(crate) fn tell(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").unwrap();
    out.flush().unwrap();
}

/// In a child: waits for the next line; false where there is none any more.
pub(crate) fn told() -> bool {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap_or(0) > 0
}

/// In a child: waits until nobody tells it anything any more, while its runtime goes on.
pub(crate) async fn until_over() {
    tokio::task::spawn_blocking(|| while told() {}).await.unwrap();
}

/// In a child: a runtime as the programs have it.
pub(crate) fn runtime() -> tokio::runtime::Runtime {
    vfio_checkpoint_server::serve::runtime(None).unwrap()
}
