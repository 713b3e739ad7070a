//! What happens to one device after a failed SET.

use vfio_checkpoint_fsm::{
    Capabilities, Outcome, Recovery, Role, State, after_failed_reset, after_failed_walk, recover,
    recover_entry,
};

use crate::table::{Table, check};

#[test]
fn every_role_capability_and_landing() {
    let mut table = Table::new(&["CAPABILITIES", "LANDED IN", "SOURCE", "ENTERING RESUMING", "DESTINATION"]);
    for capabilities in Capabilities::ALL {
        table.gap();
        for landed in State::ALL {
            table.row([
                capabilities.to_string(),
                landed.to_string(),
                recover(Role::Source, capabilities, landed).to_string(),
                recover_entry(capabilities, landed).to_string(),
                recover(Role::Destination, capabilities, landed).to_string(),
            ]);
        }
    }
    table.gap();
    table.row(["after a failed walk", "", "", "", ""].map(str::to_owned));
    for role in [Role::Source, Role::Destination] {
        table.row([format!("  {role}"), String::new(), after_failed_walk(role).to_string()]);
    }
    table.row(["after a failed reset".to_owned(), String::new(), after_failed_reset().to_string()]);
    check("recovery", &table.render());
}

#[test]
fn a_source_is_never_reset() {
    for capabilities in Capabilities::ALL {
        for landed in State::ALL {
            assert_ne!(recover(Role::Source, capabilities, landed), Recovery::Reset);
        }
    }
    assert_ne!(after_failed_walk(Role::Source), Recovery::Reset);
}

#[test]
fn a_reset_always_means_that_the_state_is_lost() {
    assert_eq!(Recovery::Reset.outcome(), Some(Outcome::StateLost));
    assert_eq!(Recovery::Quarantine.outcome(), None);
    for kept in [Recovery::Nothing, Recovery::Walk { to: State::Running }] {
        assert_eq!(kept.outcome(), Some(Outcome::Preserved));
    }
}

#[test]
fn a_set_is_preserved_only_as_a_whole() {
    use Outcome::{Preserved, StateLost};
    assert_eq!(Preserved.and(Preserved), Preserved);
    for (a, b) in [(Preserved, StateLost), (StateLost, Preserved), (StateLost, StateLost)] {
        assert_eq!(a.and(b), StateLost);
    }
}
