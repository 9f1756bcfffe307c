//! No file outgrows what can be read in one go.

use crate::tree::{Tree, Violation};

/// Lines that a file may have, its tests not counted.
const LIMIT: usize = 500;

pub(crate) fn check(tree: &Tree) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (path, source) in &tree.rust {
        let lines = (1..=source.lines.len()).filter(|line| !source.is_test(*line)).count();
        if lines > LIMIT {
            let text = format!(
                "{lines} lines without tests, over the limit of {LIMIT}: split it into modules, each named for what it provides"
            );
            violations.push(Violation::new(path, 0, text));
        }
    }
    violations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_do_not_count() {
        let tests = "#[cfg(test)]\nmod tests {\n}\n";
        let just_fits = format!("{}{tests}", "//\n".repeat(LIMIT));
        let too_long = format!("{}{tests}", "//\n".repeat(LIMIT + 1));
        let tree = Tree::new([("a/fits.rs".to_owned(), just_fits), ("a/long.rs".to_owned(), too_long)]);
        let paths: Vec<_> = check(&tree).into_iter().map(|violation| violation.path).collect();
        assert_eq!(paths, ["a/long.rs"]);
    }
}
