use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split_whitespace())
}

#[test]
fn the_definition_holds() {
    Cli::command().debug_assert();
}

#[test]
fn what_cannot_be_is_refused() {
    for (line, kind) in [
        ("vfioctl", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ("vfioctl save --output d", ErrorKind::MissingRequiredArgument),
        ("vfioctl save a --output d --store s", ErrorKind::ArgumentConflict),
        ("vfioctl save a --store s --replace", ErrorKind::ArgumentConflict),
        ("vfioctl save a --output d --no-wait", ErrorKind::ArgumentConflict),
        ("vfioctl save a --store s --no-wait --wait-timeout 1s", ErrorKind::ArgumentConflict),
        ("vfioctl restore a", ErrorKind::MissingRequiredArgument),
        ("vfioctl restore a --input d --checkpoint s/1", ErrorKind::ArgumentConflict),
        ("vfioctl restore a --input d --allow-inconsistent", ErrorKind::ArgumentConflict),
        ("vfioctl restore a --checkpoint 1", ErrorKind::ValueValidation),
        ("vfioctl devices reset a", ErrorKind::MissingRequiredArgument),
        ("vfioctl devices reset a --keep-state --discard-state", ErrorKind::ArgumentConflict),
        ("vfioctl dirty-tracking report a --range 4096", ErrorKind::ValueValidation),
        ("vfioctl dirty-tracking start a --page-size 3000", ErrorKind::ValueValidation),
        ("vfioctl operations resume a --wait-timeout 1s", ErrorKind::MissingRequiredArgument),
        ("vfioctl certs issue ../a", ErrorKind::ValueValidation),
        ("vfioctl completion tcsh", ErrorKind::InvalidValue),
        ("vfioctl save a", ErrorKind::MissingRequiredArgument),
        ("vfioctl save a/../b --output d", ErrorKind::ValueValidation),
        ("vfioctl save a --output d --downtime-limit 300", ErrorKind::ValueValidation),
        ("vfioctl save a --output d --downtime-limit 0s", ErrorKind::ValueValidation),
        ("vfioctl save a --output d --downtime-limit 25h", ErrorKind::ValueValidation),
        ("vfioctl save a --output d --memory post-copy", ErrorKind::InvalidValue),
        ("vfioctl devices list --server-name a --server-spiffe-id spiffe://d/a", ErrorKind::ArgumentConflict),
        ("vfioctl operations get a.b", ErrorKind::ValueValidation),
        ("vfioctl migrate a", ErrorKind::MissingRequiredArgument),
        ("vfioctl migrate --to b", ErrorKind::MissingRequiredArgument),
        ("vfioctl migrate a --to b --request-id mine", ErrorKind::ValueValidation),
        ("vfioctl migrate a --to b --on-no-convergence stay", ErrorKind::InvalidValue),
        ("vfioctl migrate a --to b --to-key k", ErrorKind::MissingRequiredArgument),
        ("vfioctl migrate a --to b --onto x/y", ErrorKind::ValueValidation),
        ("vfioctl operations resolve 1 --resume-here --let-go", ErrorKind::ArgumentConflict),
        ("vfioctl operations resolve 1 --accept-loss", ErrorKind::MissingRequiredArgument),
    ] {
        let error = parse(line).unwrap_err();
        assert_eq!(error.kind(), kind, "{line}");
        assert_eq!(error.exit_code(), 2, "{line}");
    }
}

#[test]
fn the_exit_codes_are_in_the_help() {
    let help = Cli::command().render_long_help().to_string();
    for code in ["0 ", "1 ", "2 ", "3 ", "4 ", "5 ", "130 "] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(code)), "{code}: {help}");
    }
}

/// The help of one command as a person sees it.
fn help(path: &[&str]) -> String {
    let mut command = Cli::command().term_width(100).max_term_width(100);
    command.build();
    let mut found = &mut command;
    for name in path {
        found = found.find_subcommand_mut(name).unwrap();
    }
    found.render_help().to_string()
}

fn all_paths(command: &clap::Command, above: &[String], all: &mut Vec<Vec<String>>) {
    all.push(above.to_vec());
    for below in command.get_subcommands() {
        let path = [above, &[below.get_name().to_owned()]].concat();
        all_paths(below, &path, all);
    }
}

/// The options that all commands have are shown once.
fn own(help: &str) -> &str {
    help.split("\nCommon options:").next().unwrap()
}

#[test]
fn every_help_as_a_person_sees_it() {
    let mut paths = Vec::new();
    all_paths(&Cli::command(), &[], &mut paths);
    let mut text = help(&[]);
    for path in &paths[1..] {
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        text.extend([format!("\n\n===== vfioctl {} =====\n{}", path.join(" "), own(&help(&path)))]);
    }
    assert!(text.lines().all(|line| line.chars().count() <= 100), "a line is too long");
    insta::assert_snapshot!(text);
}

#[test]
fn errors_say_what_to_do() {
    let mut text = String::new();
    for line in [
        "vfioctl sav",
        "vfioctl save a",
        "vfioctl save nic/a --store local",
        "vfioctl save a --store local --downtime-limit 300",
        "vfioctl restore a --checkpoint 019aa7b4c10-5c0ffee15c0ffee1",
        "vfioctl devices reset a",
        "vfioctl dirty-tracking report a --range 0x1000",
        "vfioctl checkpoints get stores/local/x",
        "vfioctl certs issue ../a",
    ] {
        let error = parse(line).unwrap_err().to_string();
        text.extend([format!("$ {line}\n{error}\n")]);
    }
    insta::assert_snapshot!(text);
}

#[test]
fn the_last_of_wait_and_no_wait_counts() {
    for (line, is_wanted) in [
        ("vfioctl save a --store s", true),
        ("vfioctl save a --store s --no-wait", false),
        ("vfioctl save a --store s --no-wait --wait", true),
        ("vfioctl save a --store s --wait --wait-timeout 5s", true),
    ] {
        let matches = Cli::command().try_get_matches_from(line.split_whitespace()).unwrap();
        let waiting = Waiting::from_arg_matches(matches.subcommand_matches("save").unwrap()).unwrap();
        assert_eq!(waiting.is_wanted(), is_wanted, "{line}");
    }
}
