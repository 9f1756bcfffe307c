//! The tree's files, and what is said when one breaks a rule.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fmt, fs};

use anyhow::{Context as _, Result};

use crate::rust::Source;

/// Folders of the root that hold our crates.
const CRATES: [&str; 6] = ["iommu", "framework", "drivers", "apps", "benches", "ci"];

/// A place that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Violation {
    /// From the root of the tree.
    pub(crate) path: String,
    /// From 1; 0 is the file as a whole.
    pub(crate) line: usize,
    /// The rule and why.
    pub(crate) text: String,
}

impl Violation {
    pub(crate) fn new(path: &str, line: usize, text: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, text: text.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { path, line, text } = self;
        if *line == 0 { write!(f, "{path}: {text}") } else { write!(f, "{path}:{line}: {text}") }
    }
}

/// Every Rust file and manifest of our crates, by path from the root.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) rust: BTreeMap<String, Source>,
    pub(crate) manifests: BTreeMap<String, String>,
}

impl Tree {
    /// Reads the tree under `root`.
    pub(crate) fn read(root: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for folder in CRATES {
            walk(root, folder, &mut files)?;
        }
        Ok(Self::new(files))
    }

    /// A tree of these files.
    pub(crate) fn new(files: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut tree = Self::default();
        for (path, text) in files {
            if path.ends_with("Cargo.toml") {
                tree.manifests.insert(path, text);
            } else {
                tree.rust.insert(path, Source::parse(&text));
            }
        }
        tree.mark_test_files();
        tree
    }

    /// Marks what is test code as a whole: integration tests, and modules declared under `#[cfg(test)]`.
    fn mark_test_files(&mut self) {
        let mut roots = Vec::new();
        for (path, source) in &self.rust {
            let folder = match path.rsplit_once('/') {
                Some((folder, "mod.rs" | "lib.rs" | "main.rs")) => folder.to_owned(),
                _ => path.trim_end_matches(".rs").to_owned(),
            };
            roots.extend(source.test_modules.iter().map(|module| format!("{folder}/{module}")));
        }
        for (path, source) in &mut self.rust {
            let integration = path.split('/').nth(1) == Some("tests");
            let declared = roots.iter().any(|root| {
                path.strip_prefix(root).is_some_and(|rest| rest == ".rs" || rest.starts_with('/'))
            });
            if integration || declared {
                source.all_is_test();
            }
        }
    }
}

/// The text of the file at `path` under `root`.
pub(crate) fn read(root: &Path, path: &str) -> Result<String> {
    fs::read_to_string(root.join(path)).with_context(|| format!("cannot read {path}"))
}

fn walk(root: &Path, folder: &str, files: &mut BTreeMap<String, String>) -> Result<()> {
    let entries = fs::read_dir(root.join(folder)).with_context(|| format!("cannot list {folder}"))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {folder}"))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{folder}/{name}");
        if entry.file_type().with_context(|| path.clone())?.is_dir() {
            if name != "target" && !name.starts_with('.') {
                walk(root, &path, files)?;
            }
        } else if Path::new(&name).extension() == Some("rs".as_ref()) || name == "Cargo.toml" {
            let text = read(root, &path)?;
            files.insert(path, text);
        }
    }
    Ok(())
}

/// Whether `path` fits `pattern`: `*` is any part of one name, a whole `**` any number of folders and files.
pub(crate) fn fits(pattern: &str, path: &str) -> bool {
    fn names(pattern: &[&str], path: &[&str]) -> bool {
        match (pattern, path) {
            ([], []) => true,
            (["**", rest @ ..], _) => (0..=path.len()).any(|skip| names(rest, &path[skip..])),
            ([first, rest @ ..], [name, names_left @ ..]) => {
                fits_name(first, name) && names(rest, names_left)
            }
            _ => false,
        }
    }
    fn fits_name(pattern: &str, name: &str) -> bool {
        match pattern.split_once('*') {
            None => pattern == name,
            Some((before, after)) => name.strip_prefix(before).is_some_and(|rest| {
                rest.char_indices()
                    .map(|(at, _)| at)
                    .chain([rest.len()])
                    .any(|at| fits_name(after, &rest[at..]))
            }),
        }
    }
    let (pattern, path): (Vec<_>, Vec<_>) = (pattern.split('/').collect(), path.split('/').collect());
    names(&pattern, &path)
}

/// A rule file's lines that say something: (line number, text without its comment).
pub(crate) fn rules(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(at, line)| (at + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        assert!(fits("drivers/src/*/driver/**", "drivers/src/dsa/driver/queue/mod.rs"));
        assert!(fits("drivers/src/*/driver*", "drivers/src/dsa/driver.rs"));
        assert!(fits("apps/**", "apps/src/main.rs"));
        assert!(!fits("drivers/src/*/driver*", "drivers/src/dsa/driver/queue.rs"));
        assert!(!fits("drivers/src/*/driver/**", "drivers/src/dsa/model/driver.rs"));
        assert!(!fits("iommu/src/memory.rs", "iommu/src/memory.rst"));
    }

    #[test]
    fn a_module_declared_under_cfg_test_is_a_test_with_its_folder() {
        let file = |path: &str, text: &str| (path.to_owned(), text.to_owned());
        let tree = Tree::new([
            file("a/src/lib.rs", "#[cfg(test)]\nmod checks;\nmod real;"),
            file("a/src/checks.rs", "fn f() {}"),
            file("a/src/checks/more.rs", "fn f() {}"),
            file("a/src/checksum.rs", "fn f() {}"),
            file("a/src/real.rs", "fn f() {}\n#[cfg(all(test, loom))] mod twin;"),
            file("a/src/real/twin.rs", "fn f() {}"),
            file("a/tests/whole.rs", "fn f() {}"),
        ]);
        let tests: Vec<_> =
            tree.rust.iter().filter(|(_, source)| source.is_test(1)).map(|(path, _)| path.as_str()).collect();
        assert_eq!(
            tests,
            [
                "a/src/checks.rs",
                "a/src/checks/more.rs",
                "a/src/lib.rs",
                "a/src/real/twin.rs",
                "a/tests/whole.rs"
            ]
        );
    }
}
