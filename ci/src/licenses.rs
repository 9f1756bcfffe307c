//! Every dependency's licence fits ours.

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::tree::{Violation, rules};

/// `metadata` is what `cargo metadata` printed, `list` the licences that fit, an SPDX id a line.
pub(crate) fn check(metadata: &str, list: &str) -> Result<Vec<Violation>> {
    let metadata: Value =
        serde_json::from_str(metadata).context("standard input is not cargo metadata's JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let allowed: Vec<&str> = rules(list).map(|(_, id)| id).collect();
    let mut violations = Vec::new();
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        let expression = text("license");
        let what = format!("{} {}", text("name"), text("version"));
        match fits(expression, &allowed) {
            Ok(true) => {}
            Ok(false) if expression.is_empty() => {
                violations.push(Violation::new(&what, 0, "names no licence; pick another crate"));
            }
            Ok(false) => violations.push(Violation::new(
                &what,
                0,
                format!("its licence, {expression}, is not one of those in ci/licenses that fit Apache-2.0; pick another crate"),
            )),
            Err(error) => violations.push(Violation::new(&what, 0, format!("its licence, {expression}: {error}"))),
        }
    }
    Ok(violations)
}

/// Whether an SPDX licence expression can be satisfied with the allowed ids alone.
fn fits(expression: &str, allowed: &[&str]) -> Result<bool> {
    // Before SPDX expressions, a slash meant "or".
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    if words.is_empty() {
        return Ok(false);
    }
    let mut parser = Parser { words: &words, allowed };
    let fits = parser.alternatives()?;
    if let [word, ..] = parser.words {
        bail!("`{word}` is not expected there");
    }
    Ok(fits)
}

/// `AND` binds tighter than `OR` (SPDX 2.3, annex D.4).
struct Parser<'a> {
    words: &'a [&'a str],
    allowed: &'a [&'a str],
}

impl Parser<'_> {
    fn takes(&mut self, word: &str) -> bool {
        let found = self.words.first() == Some(&word);
        if found {
            self.words = &self.words[1..];
        }
        found
    }

    fn alternatives(&mut self) -> Result<bool> {
        let mut fits = self.all()?;
        while self.takes("OR") {
            fits |= self.all()?;
        }
        Ok(fits)
    }

    fn all(&mut self) -> Result<bool> {
        let mut fits = self.licence()?;
        while self.takes("AND") {
            fits &= self.licence()?;
        }
        Ok(fits)
    }

    fn licence(&mut self) -> Result<bool> {
        if self.takes("(") {
            let fits = self.alternatives()?;
            if !self.takes(")") {
                bail!("a parenthesis is not closed");
            }
            return Ok(fits);
        }
        let [id, rest @ ..] = self.words else { bail!("it ends too early") };
        self.words = rest;
        if self.takes("WITH") {
            let [exception, rest @ ..] = self.words else { bail!("it ends too early") };
            self.words = rest;
            return Ok(self.allowed.contains(&format!("{id} WITH {exception}").as_str()));
        }
        Ok(self.allowed.contains(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: [&str; 3] = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"];

    #[test]
    fn expressions() {
        for good in [
            "MIT",
            "MIT OR GPL-2.0-only",
            "GPL-2.0-only/MIT",
            "(GPL-2.0-only OR MIT) AND Apache-2.0",
            "GPL-2.0-only AND MIT OR Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(fits(good, &ALLOWED).expect(good), "{good}");
        }
        for bad in ["", "GPL-2.0-only", "MIT AND GPL-2.0-only", "MIT WITH GCC-exception-3.1", "mit"] {
            assert!(!fits(bad, &ALLOWED).expect(bad), "{bad}");
        }
        for broken in ["MIT OR", "(MIT", "MIT MIT", "MIT)", "MIT WITH"] {
            assert!(fits(broken, &ALLOWED).is_err(), "{broken}");
        }
    }

    #[test]
    fn a_package_without_or_with_another_licence_is_named() {
        let metadata = r#"{"packages": [
            {"name": "good", "version": "1.0.0", "license": "MIT"},
            {"name": "none", "version": "1.0.0", "license": null},
            {"name": "other", "version": "2.0.0", "license": "AGPL-3.0-only"}
        ]}"#;
        let violations = check(metadata, "# ours\nMIT\n").expect("valid");
        let what: Vec<_> = violations.iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(what, ["none 1.0.0", "other 2.0.0"]);
    }
}
