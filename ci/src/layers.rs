//! Which crate may depend on which, and which modules and types a file never names. The rules are in `ci/layers`,
//! whose head explains how they are written.

use anyhow::{Result, bail};

use crate::rust::Source;
use crate::tree::{Tree, Violation, fits, rules};

/// What `ci/layers` says.
#[derive(Debug, Default)]
struct Rules {
    crates: Vec<Crate>,
    names: Vec<Names>,
}

/// `crate NAME uses NAME...`
#[derive(Debug)]
struct Crate {
    line: usize,
    name: String,
    uses: Vec<String>,
}

/// `in PATTERN...` with its `never`, `has` and `because`.
#[derive(Debug, Default)]
struct Names {
    line: usize,
    patterns: Vec<String>,
    never: Vec<String>,
    has: Option<String>,
    because: String,
}

impl Rules {
    fn parse(text: &str) -> Result<Self> {
        let mut parsed = Self::default();
        for (line, rule) in rules(text) {
            let (verb, rest) = rule.split_once(char::is_whitespace).unwrap_or((rule, ""));
            let words = || rest.split_whitespace().map(str::to_owned);
            match (verb, parsed.names.last_mut()) {
                ("crate", _) => {
                    let mut words = words();
                    let (Some(name), Some("uses")) = (words.next(), words.next().as_deref()) else {
                        bail!("ci/layers:{line}: write `crate NAME uses NAME...`");
                    };
                    parsed.crates.push(Crate { line, name, uses: words.collect() });
                }
                ("in", _) => {
                    parsed.names.push(Names { line, patterns: words().collect(), ..Names::default() });
                }
                ("never", Some(names)) => names.never = words().collect(),
                ("has", Some(names)) => names.has = Some(rest.trim().to_owned()),
                ("because", Some(names)) => rest.trim().clone_into(&mut names.because),
                _ => bail!(
                    "ci/layers:{line}: `{verb}` is not crate, in, never, has or because, or has no `in` above it"
                ),
            }
        }
        for names in &parsed.names {
            if names.because.is_empty() || (names.never.is_empty() && names.has.is_none()) {
                bail!("ci/layers:{}: `in` needs a `never` or a `has`, and a `because`", names.line);
            }
        }
        Ok(parsed)
    }
}

/// `text` is `ci/layers`.
pub(crate) fn check(tree: &Tree, text: &str) -> Result<Vec<Violation>> {
    let rules = Rules::parse(text)?;
    let mut violations = Vec::new();
    for (path, manifest) in &tree.manifests {
        check_manifest(path, manifest, &rules.crates, &mut violations);
    }
    for rule in &rules.names {
        let mut files = tree
            .rust
            .iter()
            .filter(|(path, _)| rule.patterns.iter().any(|pattern| fits(pattern, path)))
            .peekable();
        if files.peek().is_none() {
            violations.push(Violation::new(
                "ci/layers",
                rule.line,
                "no file fits this rule, so it checks nothing: mend or remove it",
            ));
        }
        for (path, source) in files {
            check_names(path, source, rule, &mut violations);
        }
    }
    Ok(violations)
}

/// A member's dependencies: our own as `ci/layers` allows, and all of them from the workspace's table.
fn check_manifest(path: &str, text: &str, crates: &[Crate], violations: &mut Vec<Violation>) {
    let mut section = "";
    let mut package = None;
    for (line, content) in rules(text) {
        if let Some(header) = content.strip_prefix('[') {
            section = header.trim_end_matches(']');
            if is_dependencies(section.rsplit_once('.').map_or("", |(table, _)| table)) {
                violations.push(Violation::new(
                    path,
                    line,
                    "write a dependency on one line, as `NAME.workspace = true`",
                ));
            }
        } else if section == "package"
            && let Some(name) = content.strip_prefix("name = ")
        {
            let name = name.trim_matches('"');
            package = crates.iter().find(|known| known.name == name);
            if package.is_none() {
                let text = format!("ci/layers does not say what the crate `{name}` may depend on: add it");
                violations.push(Violation::new(path, line, text));
            }
        } else if is_dependencies(section) {
            let dependency = content.split(['.', ' ', '=']).next().unwrap_or_default();
            if !content.contains("workspace = true") {
                let text = format!(
                    "`{dependency}` does not come from the workspace's table: write `{dependency}.workspace = true`, so that \
                     a version stands in one place"
                );
                violations.push(Violation::new(path, line, text));
            }
            let ours = crates.iter().any(|known| known.name == dependency);
            if let Some(package) =
                package.filter(|package| ours && !package.uses.iter().any(|used| used == dependency))
            {
                let text = format!(
                    "`{}` may not depend on `{dependency}`: a crate uses only the layers below it (ci/layers:{})",
                    package.name, package.line
                );
                violations.push(Violation::new(path, line, text));
            }
        }
    }
}

/// Whether a manifest's section is a table of dependencies, `[target.'cfg(..)'.dependencies]` included.
fn is_dependencies(section: &str) -> bool {
    let table = section.rsplit('.').next().unwrap_or_default();
    matches!(table, "dependencies" | "dev-dependencies" | "build-dependencies")
}

fn check_names(path: &str, source: &Source, rule: &Names, violations: &mut Vec<Violation>) {
    if let Some(text) =
        rule.has.as_ref().filter(|text| !source.lines.iter().any(|line| line.trim() == text.as_str()))
    {
        let text = format!("lacks `{text}`: {} (ci/layers:{})", rule.because, rule.line);
        violations.push(Violation::new(path, 0, text));
    }
    let mut in_use = false;
    for (at, token) in source.tokens.iter().enumerate() {
        match token.text.as_str() {
            "use" => in_use = true,
            ";" => in_use = false,
            _ => {}
        }
        if source.is_test(token.line) {
            continue;
        }
        let segment = in_use
            || source.is_path_separator(at + 1)
            || (at >= 2 && source.is_path_separator(at - 2))
            || (at >= 1 && source.is(at - 1, "mod"));
        let found = rule.never.iter().find(|never| {
            if never.starts_with(char::is_uppercase) {
                has_word(&token.text, never)
            } else {
                segment
                    && token
                        .text
                        .strip_prefix(never.as_str())
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
            }
        });
        if found.is_some() {
            let text = format!("names `{}`: {} (ci/layers:{})", token.text, rule.because, rule.line);
            violations.push(Violation::new(path, token.line, text));
        }
    }
}

/// Whether `word` is one of the words that a type's name is made of: `Model` is in `DsaModel`, not in `Modeller`.
fn has_word(name: &str, word: &str) -> bool {
    name.match_indices(word).any(|(at, _)| !name[at + word.len()..].starts_with(char::is_lowercase))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "
        crate low uses
        crate high uses low
        in high/src/*/driver.rs high/src/lib.rs
          never vfio model Model
          because a driver runs over everything
        in high/src/lib.rs
          has #![forbid(unsafe_code)]
          because it is safe";

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let mut all = vec![("high/src/lib.rs", "#![forbid(unsafe_code)]\n")];
        all.retain(|(path, _)| files.iter().all(|(other, _)| other != path));
        all.extend(files);
        let tree = Tree::new(all.into_iter().map(|(path, text)| (path.to_owned(), text.to_owned())));
        check(&tree, RULES).expect("valid rules").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_layer_uses_those_below() {
        let manifest = "[package]\nname = \"high\"\n[dependencies]\nlow.workspace = true\n\
                        other = { workspace = true, optional = true }\n";
        assert_eq!(found(&[("high/Cargo.toml", manifest)]), [""; 0]);
    }

    #[test]
    fn other_dependencies_are_refused() {
        let cases = [
            (
                "name = \"low\"\n[dependencies]\nhigh.workspace = true",
                "Cargo.toml:4: `low` may not depend on `high`",
            ),
            ("name = \"low\"\n[dev-dependencies]\nhigh.workspace = true", "Cargo.toml:4: `low` may not"),
            (
                "name = \"low\"\n[target.'cfg(x)'.dependencies]\nhigh.workspace = true",
                "Cargo.toml:4: `low` may not",
            ),
            ("name = \"low\"\n[dependencies]\nlibc = \"0.2\"", "Cargo.toml:4: `libc` does not come from"),
            (
                "name = \"low\"\n[dependencies.libc]\nversion = \"0.2\"",
                "Cargo.toml:3: write a dependency on one line",
            ),
            ("name = \"new\"", "Cargo.toml:2: ci/layers does not say"),
        ];
        for (text, expected) in cases {
            let lines = found(&[("Cargo.toml", &format!("[package]\n{text}\n"))]);
            assert!(lines.len() == 1 && lines[0].starts_with(expected), "{text}: {lines:?}");
        }
    }

    #[test]
    fn forbidden_names_are_found() {
        for text in [
            "use underpass::vfio;",
            "use underpass::{dma, vfio::Device};",
            "fn f() { crate::dsa::model::g() }",
            "mod model;",
            "use vfio_bindings::bindings;",
            "fn f(m: &super::DsaModel) {}",
            "fn f(m: ModelOptions) {}",
        ] {
            let lines = found(&[("high/src/dsa/driver.rs", &format!("//! A driver.\n{text}\n"))]);
            assert!(
                lines.len() == 1 && lines[0].starts_with("high/src/dsa/driver.rs:2: names"),
                "{text}: {lines:?}"
            );
        }
    }

    #[test]
    fn words_tests_and_other_files_are_free() {
        let text = "//! The model is its twin.\nconst A: &str = \"vfio::x\";\nfn f(model: u8) { model; }\nstruct Modeller;\n\
                    #[cfg(test)]\nmod tests {\n use crate::model::DsaModel;\n}\n";
        assert_eq!(found(&[("high/src/dsa/driver.rs", text)]), [""; 0]);
        assert_eq!(found(&[("high/src/dsa/other.rs", "use crate::model::DsaModel;")]), [""; 0]);
    }

    #[test]
    fn a_missing_line_is_found() {
        let lines = found(&[("high/src/lib.rs", "// #![forbid(unsafe_code)]\n")]);
        assert!(lines.len() == 1 && lines[0].starts_with("high/src/lib.rs: lacks"), "{lines:?}");
    }

    #[test]
    fn a_rule_that_fits_no_file_is_found() {
        let violations = check(&Tree::default(), RULES).expect("valid rules");
        assert_eq!(violations.len(), 2);
    }

    #[test]
    fn rules_that_cannot_be_read_are_refused() {
        for text in ["crate a", "never a", "in a", "in a\nnever b", "in a\nbecause b", "forbid a"] {
            assert!(Rules::parse(text).is_err(), "{text}");
        }
    }
}
