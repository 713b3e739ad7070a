//! A process that is killed with its value, and the lines that it says.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::lab::PATIENCE;

/// A process, and what it says on standard error.
pub(crate) struct Process {
    name: String,
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
    said: Arc<Mutex<Vec<String>>>,
}

impl Process {
    pub(crate) fn start(name: &str, command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (tell, lines) = mpsc::unbounded_channel();
        let said = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&said);
        // Ends with the process: its end of the pipe is the only one.
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                keep.lock().unwrap().push(line.clone());
                let _ = tell.send(line);
            }
        });
        Self { name: name.to_owned(), child, lines, said }
    }

    /// Waits for a line for which `wanted` has an answer. What came before it is passed over.
    pub(crate) async fn wait_for<T>(&mut self, what: &str, mut wanted: impl FnMut(&str) -> Option<T>) -> T {
        let found = timeout(PATIENCE, async {
            while let Some(line) = self.lines.recv().await {
                if let Some(found) = wanted(&line) {
                    return Some(found);
                }
            }
            None
        });
        match found.await {
            Ok(Some(found)) => found,
            Ok(None) => panic!("{} ended and never said {what}:\n{}", self.name, self.said()),
            Err(elapsed) => panic!("{} never said {what}: {elapsed}:\n{}", self.name, self.said()),
        }
    }

    /// The end of everything that it said.
    pub(crate) fn said(&self) -> String {
        let said = self.said.lock().unwrap();
        said.iter().skip(said.len().saturating_sub(80)).fold(String::new(), |mut text, line| {
            let _ = writeln!(text, "    {}: {line}", self.name);
            text
        })
    }

    /// Gives it a line on standard input.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Kills it with SIGKILL. It is gone when this returns.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// A program of the workspace: beside this test's, where cargo puts it. It is built where it is not there, or is older than
/// what it was built from: a test of this package alone builds no program of another.
pub(crate) fn program(name: &str, package: &str) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let deps = env::current_exe().unwrap();
    let folder = deps.parent().and_then(Path::parent).unwrap().to_owned();
    let program = folder.join(name);
    if !is_fresh(&program) {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "-p", package, "--bin", name, "--target-dir"]);
        cargo.arg(folder.parent().unwrap()).current_dir(env!("CARGO_MANIFEST_DIR"));
        if folder.file_name().is_some_and(|name| name == "release") {
            cargo.arg("--release");
        }
        assert!(cargo.status().unwrap().success(), "building {name}");
    }
    program
}

/// Whether a program is there and nothing that it was built from is younger, by the list that cargo leaves beside it.
fn is_fresh(program: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|found| found.modified());
    let (Ok(built), Ok(list)) = (modified(program), fs::read_to_string(program.with_extension("d"))) else {
        return false;
    };
    let mut sources = list.split_whitespace().skip(1);
    sources.all(|source| modified(source.as_ref()).is_ok_and(|modified| modified <= built))
}
