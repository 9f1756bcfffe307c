//! Texts for people: no place is left to be filled in, and what they link to is there.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::tree::{self, Violation};

/// Checks every Markdown file under `root`.
pub(crate) fn check(root: &Path) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for path in markdown(root, "")? {
        let text = tree::read(root, &path)?;
        let folder = Path::new(&path).parent().unwrap_or(Path::new(""));
        violations.extend(check_text(&path, &text, |link| root.join(folder).join(link).exists()));
    }
    Ok(violations)
}

fn markdown(root: &Path, folder: &str) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let shown = || format!("cannot list {}", if folder.is_empty() { "." } else { folder });
    for entry in fs::read_dir(root.join(folder)).with_context(shown)? {
        let entry = entry.with_context(shown)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
        if entry.file_type().with_context(shown)?.is_dir() {
            if name != "target" && !name.starts_with('.') {
                found.extend(markdown(root, &path)?);
            }
        } else if Path::new(&name).extension() == Some("md".as_ref()) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn check_text(path: &str, text: &str, exists: impl Fn(&str) -> bool) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut in_code = false;
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code || line.starts_with("    ") {
            continue;
        }
        let line = without_code(line);
        let mut tell = |what: String| violations.push(Violation::new(path, at + 1, what));
        for comment in between(&line, "<!--", "-->") {
            let name = comment.trim();
            if !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-') {
                tell(format!("`<!-- {name} -->` is left to be filled in"));
            }
        }
        for link in between(&line, "](", ")") {
            let file = link.split(['#', ' ']).next().unwrap_or_default();
            if !file.is_empty() && !file.contains(':') && !exists(file) {
                tell(format!("links to {file}, which does not exist"));
            }
        }
    }
    violations
}

/// The line without what stands between backticks, which is no link.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect()
}

fn between<'a>(line: &'a str, open: &'a str, close: &'a str) -> impl Iterator<Item = &'a str> {
    line.split(open).skip(1).filter_map(move |rest| rest.split_once(close)).map(|(inside, _)| inside)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str) -> Vec<usize> {
        check_text("a.md", text, |link| link == "there.md").iter().map(|violation| violation.line).collect()
    }

    #[test]
    fn places_to_be_filled_in() {
        assert_eq!(lines("text\n<!-- numbers -->\n<!-- of-the-demo -->"), [2, 3]);
        assert_eq!(lines("<!-- Why this is here: a reason. -->\n`<!-- name -->`\n    <!-- name -->"), [0; 0]);
        assert_eq!(lines("```\n<!-- name -->\n```\n<!-- name -->"), [4]);
    }

    #[test]
    fn links_to_what_is_not_there() {
        assert_eq!(lines("[a](there.md) [b](there.md#part) [c](#part) [d](https://example.org/x)"), [0; 0]);
        assert_eq!(lines("[a](there.md) and [b](gone.md#part)\n![picture](gone.svg \"title\")"), [1, 2]);
        assert_eq!(lines("`[a](gone.md)`\n```\n[a](gone.md)\n```"), [0; 0]);
    }
}
