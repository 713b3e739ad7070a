//! An agent that goes away while somebody waits, and comes back.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, ChildStderr, Command, Output};

use serde_json::{Value, json};
use vfio_checkpoint_server::security::lab::LabCa;

use crate::lab::{Lab, validity};
use crate::node::{DEVICES, Node};
use crate::process::{Process, program};
use crate::said::Said;

/// A command that waits for an operation.
struct Waiting {
    child: Child,
    stderr: BufReader<ChildStderr>,
    said: String,
}

impl Waiting {
    fn new(node: &Node, line: &str) -> Self {
        let mut child = node.command(line).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr, said: String::new() }
    }

    /// Reads until it has said a note with this text.
    fn note(&mut self, text: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.stderr.read_line(&mut line).unwrap(), 0, "it never said {text:?}: {}", self.said);
            self.said += &line;
            let told: Value = serde_json::from_str(&line).unwrap();
            if let Some(note) = told["note"].as_str().filter(|note| note.contains(text)) {
                return note.to_owned();
            }
        }
    }

    /// Waits until the devices are held, and says which operation holds them.
    fn held(&mut self) -> String {
        let begun = self.note("saving as ");
        self.note("the devices are held");
        begun.rsplit(' ').next().unwrap().to_owned()
    }

    fn end(mut self) -> Said {
        std::io::Read::read_to_string(&mut self.stderr, &mut self.said).unwrap();
        let Output { status, stdout, .. } = self.child.wait_with_output().unwrap();
        Said::new("the one that waits", Output { status, stdout, stderr: self.said.into_bytes() })
    }
}

const HOLD: &str = "save nic0 --store shelf --after hold -o json";

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_goes_on_when_the_agent_is_back() {
    let lab = Lab::new();
    let (device, holder) = (lab.path("nic0.sock"), lab.path("hold/agent.sock"));
    let mut command = Command::new(program("vfio-user-device", "vfio-checkpoint-device"));
    command.arg("--socket").arg(&device).args(["--device", "sim:seed=1,memory=256KiB"]);
    let mut process = Process::start("device", &mut command);
    process.wait_for("listening", |line| line.contains("listening on").then_some(())).await;
    let mut command = Command::new(program("vfio-checkpointd", "vfio-checkpoint-server"));
    command.arg("hold").arg("--socket").arg(&holder);
    let mut keeper = Process::start("holder", &mut command);
    keeper.wait_for("holding", |line| line.contains("holding ").then_some(())).await;
    let address = format!("vfio-user:{}", device.display());
    let more = format!("holder.socket = {}", json!(holder.to_str().unwrap()));
    let mut node = Node::with(lab, &[("nic0", &address)], &more).await;

    // A call of its gives up soon, so that it is seen to ask again.
    let mut waiting = Waiting::new(&node, &format!("{HOLD} --timeout 2s"));
    let name = waiting.held();
    node.kill();
    waiting.note("asking again");
    node.start().await;
    node.run(&format!("operations resume {name} --wait")).exits(0);
    let ended = waiting.end().exits(0).json();
    assert_eq!((&ended["operation"], &ended["result"]), (&json!(name), &json!("SUCCEEDED")));
    assert_eq!(ended["consistency"], "CONSISTENT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_with_what_the_restart_has_made_of_its_operation() {
    let mut node = Node::new(&DEVICES).await;
    let mut waiting = Waiting::new(&node, HOLD);
    let name = waiting.held();
    // Without a holder the device goes with the agent, and so does its state.
    node.kill();
    node.start().await;
    let ended = waiting.end().exits(4);
    let (operation, error) = (ended.json(), ended.error());
    assert_eq!((&operation["name"], &operation["outcome"]), (&json!(name), &json!("STATE_LOST")));
    assert_eq!((&error["operation"], &error["reason"]), (&json!(name), &operation["failure"]["reason"]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_at_once_where_its_certificate_is_not_taken_any_more() {
    let mut node = Node::new(&DEVICES).await;
    let mut waiting = Waiting::new(&node, HOLD);
    let name = waiting.held();
    node.kill();
    let others = LabCa::new(&"others.test".parse().unwrap(), validity()).unwrap();
    let trusted = node.path("others.crt");
    std::fs::write(&trusted, others.pem()).unwrap();
    let taken = node.path("agent/ca.crt");
    node.change(taken.to_str().unwrap(), trusted.to_str().unwrap());
    node.start().await;
    let ended = waiting.end().exits(5).without_result();
    let error = ended.error();
    assert_eq!((&error["reason"], &error["operation"]), (&json!("CERTIFICATE_REFUSED"), &json!(name)));
    assert!(!ended.err.contains("asking again"), "{ended:#?}");
}
