//! Put, list, take, drop; one agent at a time; limits.

use std::fs::File;
use std::io::Write;

use vfio_checkpoint_server::holder::{ClientError, Facts, HolderClient, Label, Refusal};

use crate::processes::{Ends, PATIENCE, Place, Raw, key, label};

#[test]
fn what_is_put_is_listed_and_handed_out_until_it_is_dropped() {
    let place = Place::new();
    let _holder = place.holder(&[]);
    let mut client = place.client();
    let (first, second) = (Ends::new(2), Ends::new(1));
    assert!(!client.put(&label("b"), &first.borrowed()).unwrap());
    assert!(!client.put(&label("a"), &second.borrowed()).unwrap());
    let (mut first, second) = (first.held_elsewhere(), second.held_elsewhere());
    assert_eq!(client.list().unwrap(), [label("a"), label("b")]);

    let taken = client.take(&key("b")).unwrap();
    assert_eq!((taken.label, taken.fds.len(), taken.handed_out), (label("b"), 2, 0));
    // It is the same file.
    File::from(taken.fds.into_iter().next().unwrap()).write_all(b"x").unwrap();
    let mut buffer = [0; 8];
    assert_eq!((first.read(&mut buffer), buffer[0]), (1, b'x'));

    // In place of the old ones, which are closed.
    let third = Ends::new(3);
    let newer = Label { epoch: 2, ..label("a") };
    assert!(client.put(&newer, &third.borrowed()).unwrap());
    second.closed_everywhere();
    assert_eq!(client.list().unwrap()[0], newer);
    let third = third.held_elsewhere();

    assert!(client.remove(&key("a")).unwrap());
    third.closed_everywhere();
    assert!(matches!(
        client.take(&key("a")),
        Err(ClientError::Refused(Refusal::NotHeld { key: missing })) if missing == key("a")
    ));
    assert_eq!(client.take(&key("b")).unwrap().handed_out, 1);
    drop(first.held_elsewhere());
}

#[test]
fn a_list_is_as_long_as_it_is() {
    let place = Place::new();
    let _holder = place.holder(&["--max-devices", "100"]);
    let mut client = place.client();
    let end = Ends::new(1);
    let labels: Vec<Label> = (0..100)
        .map(|i| Label { facts: Facts::new("\"".repeat(16_000)).unwrap(), ..label(&format!("{i:03}")) })
        .collect();
    for label in labels.iter().rev() {
        client.put(label, &end.borrowed()).unwrap();
    }
    assert_eq!(client.list().unwrap(), labels);
    let refused = client.put(&label("one more"), &end.borrowed());
    assert!(
        matches!(refused, Err(ClientError::Refused(Refusal::TooManyDevices { limit: 100 }))),
        "{refused:?}"
    );
    // A known one is replaced all the same, and the connection goes on.
    assert!(client.put(&label("000"), &end.borrowed()).unwrap());
    assert_eq!(client.list().unwrap().len(), 100);
    assert!(
        client.put(&label("x"), &[]).is_err() && client.put(&label("x"), &Ends::new(17).borrowed()).is_err()
    );
}

#[test]
fn one_agent_at_a_time_and_the_next_when_it_is_gone() {
    let place = Place::new();
    let _holder = place.holder(&[]);
    let mut first = place.client();
    let end = Ends::new(1);
    first.put(&label("a"), &end.borrowed()).unwrap();
    let own = std::process::id();
    for _ in 0..3 {
        let refused = HolderClient::connect(&place.socket(), PATIENCE);
        assert!(
            matches!(refused, Err(ClientError::Refused(Refusal::Busy { pid })) if pid == own),
            "{refused:?}"
        );
    }
    assert_eq!(first.list().unwrap().len(), 1, "the first goes on");
    drop(first);
    assert_eq!(place.client().list().unwrap().len(), 1);
}

/// What an agent asked before it died counts, also where it read no answer and another waits already.
#[test]
fn an_agent_that_dies_is_heard_to_its_end() {
    let place = Place::new();
    let _holder = place.holder(&[]);
    for round in 0..20 {
        let raw = Raw::agent(&place.socket());
        let end = Ends::new(1);
        let names: Vec<String> = (0..4).map(|i| format!("{round}-{i}")).collect();
        for name in &names {
            let put = serde_json::json!({ "put": { "label": label(name) } }).to_string();
            raw.send(put.as_bytes(), &end.borrowed());
        }
        drop(raw);
        let mut next = place.client();
        for name in names {
            assert!(next.remove(&key(&name)).unwrap(), "{name}");
        }
        end.closed_everywhere();
    }
}

#[test]
fn a_client_does_not_wait_for_ever() {
    let place = Place::new();
    let nobody = HolderClient::connect(&place.path("none.sock"), PATIENCE);
    assert!(matches!(nobody, Err(ClientError::Connect { .. })), "{nobody:?}");
    // A holder that is stopped accepts nobody: the kernel connects, nobody answers.
    let holder = place.holder(&[]);
    let mut client = place.client();
    holder.signal(rustix::process::Signal::STOP);
    let hasty = std::time::Duration::from_millis(50);
    let refused = HolderClient::connect(&place.socket(), hasty);
    assert!(matches!(refused, Err(ClientError::Timeout { within }) if within == hasty), "{refused:?}");
    holder.signal(rustix::process::Signal::CONT);
    assert!(client.list().unwrap().is_empty());
}

#[test]
fn another_version_is_refused() {
    let place = Place::new();
    let _holder = place.holder(&[]);
    let raw = Raw::connect(&place.socket());
    raw.send(br#"{"hello":{"version":2,"pid":7}}"#, &[]);
    assert_eq!(raw.receive().unwrap(), r#"{"refused":{"version":{"holder":1}}}"#);
    assert_eq!(raw.receive(), None);
}
