//! `unsafe` only in the listed modules, each of which says why; every block proves itself.

use anyhow::{Result, bail};

use crate::rust::Source;
use crate::tree::{Tree, Violation, fits, rules};

/// How many lines of code may stand between a `SAFETY:` comment and its `unsafe`.
const REACH: usize = 4;

struct Entry<'a> {
    line: usize,
    pattern: &'a str,
    used: bool,
}

/// `list` is `ci/unsafe-modules`: a pattern of paths a line, and why `unsafe` is there.
pub(crate) fn check(tree: &Tree, list: &str) -> Result<Vec<Violation>> {
    let mut entries = Vec::new();
    for (line, rule) in rules(list) {
        let Some((pattern, _why)) = rule.split_once(char::is_whitespace) else {
            bail!("ci/unsafe-modules:{line}: say why `{rule}` may hold unsafe code");
        };
        entries.push(Entry { line, pattern, used: false });
    }
    let mut violations = Vec::new();
    for (path, source) in &tree.rust {
        let places: Vec<usize> = (0..source.tokens.len()).filter(|at| source.is(*at, "unsafe")).collect();
        let Some(first) = places.first() else { continue };
        let mut listed = false;
        for entry in entries.iter_mut().filter(|entry| fits(entry.pattern, path)) {
            entry.used = true;
            listed = true;
        }
        if !listed {
            let text = "unsafe code outside the modules of ci/unsafe-modules: keep what must be trusted in few places";
            violations.push(Violation::new(path, source.tokens[*first].line, text));
        }
        // What needs a proof here, as against what asks its caller for one.
        let proofs: Vec<usize> = places
            .into_iter()
            .filter(|at| source.is(at + 1, "{") || source.is(at + 1, "impl"))
            .map(|at| source.tokens[at].line)
            .collect();
        violations.extend(proofs.iter().filter(|line| !is_proven(source, **line)).map(|line| {
            Violation::new(
                path,
                *line,
                "no `// SAFETY:` comment above: prove the conditions of what is called",
            )
        }));
        if proofs.iter().any(|line| !source.is_test(*line)) && !says_why(tree, path) {
            let text = "neither this module's `//!` header nor its parent's says why it must be unsafe and what makes it sound";
            violations.push(Violation::new(path, 1, text));
        }
    }
    violations.extend(entries.iter().filter(|entry| !entry.used).map(|entry| {
        let text = format!("nothing unsafe is in `{}` any more: remove the line", entry.pattern);
        Violation::new("ci/unsafe-modules", entry.line, text)
    }));
    Ok(violations)
}

/// Whether a comment with `SAFETY:` ends at most [`REACH`] lines of code above `line`.
fn is_proven(source: &Source, line: usize) -> bool {
    let mut code = 0;
    for text in source.lines[..line - 1].iter().rev().map(|text| text.trim()) {
        if text.starts_with("//") {
            if text.contains("SAFETY:") {
                return true;
            }
        } else {
            code += 1;
            if code > REACH || text.is_empty() {
                return false;
            }
        }
    }
    false
}

/// Whether the module's own header, or its parent's, speaks of `unsafe`.
fn says_why(tree: &Tree, path: &str) -> bool {
    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
    [path.to_owned(), format!("{folder}/mod.rs"), format!("{folder}.rs")].iter().any(|module| {
        tree.rust.get(module).is_some_and(|source| {
            source
                .lines
                .iter()
                .take_while(|line| line.is_empty() || line.starts_with("//"))
                .any(|line| line.starts_with("//!") && line.contains("unsafe"))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "a/src/*.rs  registers\n";

    fn texts(path: &str, text: &str) -> Vec<String> {
        let tree = Tree::new([(path.to_owned(), text.to_owned())]);
        check(&tree, LIST).expect("valid").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_proven_block_in_a_listed_module_is_fine() {
        let proven = "//! Why this is unsafe.\nfn f() {\n    // SAFETY: a long\n    // proof.\n    let x =\n        unsafe { g() };\n}\n";
        assert!(texts("a/src/a.rs", proven).is_empty());
        assert!(texts("a/src/a.rs", "/// # Safety\n/// None.\nunsafe fn f() {}\n").is_empty());
    }

    #[test]
    fn what_is_wrong_is_found() {
        let cases = [
            ("b/src/b.rs", "fn f() {}\nunsafe fn g() {}\n", "b/src/b.rs:2: unsafe code outside"),
            ("a/src/a.rs", "//! unsafe\nfn f() {\n    unsafe { g() };\n}\n", "a/src/a.rs:3: no `// SAFETY:`"),
            (
                "a/src/a.rs",
                "//! unsafe\n// SAFETY: of something else\n\nunsafe impl Send for A {}\n",
                "a/src/a.rs:4: no",
            ),
            ("a/src/a.rs", "//! A.\n// SAFETY: fine\nunsafe impl Send for A {}\n", "a/src/a.rs:1: neither"),
            ("a/src/a.rs", "//! unsafe, in words only\n", "ci/unsafe-modules:1: nothing unsafe"),
        ];
        for (path, text, expected) in cases {
            let found = texts(path, text);
            assert!(found.iter().any(|line| line.starts_with(expected)), "{text}: {found:?}");
        }
    }

    #[test]
    fn a_line_without_a_reason_is_refused() {
        assert!(check(&Tree::default(), "a/src/a.rs\n").is_err());
    }
}
