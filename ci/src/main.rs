//! The rules of this tree that neither the compiler nor clippy knows. `ci/check` runs this; the rules themselves
//! are in `ci/layers`, `ci/unsafe-modules` and `ci/licenses`, where they can be read.
//!
//! - `layers`: which crate may depend on which, and which modules and types a file never names.
//! - `unsafe`: `unsafe` only in the listed modules, each of which says why; every block proves itself.
//! - `sizes`: no file outgrows what can be read in one go.
//! - `licenses`: every dependency's licence fits ours. Reads `cargo metadata` from standard input.
//! - `docs`: Markdown files have no places left to be filled in, and no links to files that do not exist.
//! - `json CLAIM...`: standard input is one JSON object that has these keys and values.

mod docs;
mod json;
mod layers;
mod licenses;
mod rust;
mod sizes;
mod tree;
mod unsafety;

use std::io::{Read as _, stdin};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use tree::{Tree, Violation};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(violations) if violations.is_empty() => ExitCode::SUCCESS,
        Ok(violations) => {
            for violation in &violations {
                eprintln!("{violation}");
            }
            eprintln!("{} violation(s)", violations.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("underpass-ci: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: &[String]) -> Result<Vec<Violation>> {
    // ci/check runs this at the root of the tree.
    let root = Path::new(".");
    let (command, rest) = match arguments {
        [] => ("", arguments),
        [command, rest @ ..] => (command.as_str(), rest),
    };
    match (command, rest) {
        ("layers", []) => layers::check(&Tree::read(root)?, &tree::read(root, "ci/layers")?),
        ("unsafe", []) => unsafety::check(&Tree::read(root)?, &tree::read(root, "ci/unsafe-modules")?),
        ("sizes", []) => Ok(sizes::check(&Tree::read(root)?)),
        ("licenses", []) => licenses::check(&standard_input()?, &tree::read(root, "ci/licenses")?),
        ("docs", []) => docs::check(root),
        ("json", claims) => Ok(json::check(&standard_input()?, claims)),
        _ => bail!("usage: underpass-ci layers | unsafe | sizes | licenses | docs | json CLAIM..."),
    }
}

fn standard_input() -> Result<String> {
    let mut text = String::new();
    stdin().read_to_string(&mut text)?;
    Ok(text)
}
