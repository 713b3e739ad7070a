//! Results on standard output. A reader that went away is no failure: what was asked for is done all the same.

use std::fmt;
use std::io::{self, ErrorKind, Write};

use serde::Serialize;

use crate::failure::CommandFailure;

/// Prints one line.
pub(crate) fn line(text: fmt::Arguments<'_>) -> Result<(), CommandFailure> {
    match writeln!(io::stdout(), "{text}") {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(CommandFailure::unprinted(&error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Prints one JSON document.
pub(crate) fn print_json<T: Serialize>(value: &T) -> Result<(), CommandFailure> {
    let text = serde_json::to_string_pretty(value).map_err(|error| CommandFailure::unprinted(&error))?;
    line(format_args!("{text}"))
}

/// Prints rows under a header, in columns.
pub(crate) fn print_table<const N: usize>(
    header: &[String; N],
    rows: &[[String; N]],
) -> Result<(), CommandFailure> {
    let width = |column: usize| {
        std::iter::once(header).chain(rows).map(|row| row[column].chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in std::iter::once(header).chain(rows) {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        line(format_args!("{}", cells.join("  ").trim_end()))?;
    }
    Ok(())
}
