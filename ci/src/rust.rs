//! Just enough of Rust's grammar to find names in code and not in comments, strings or tests.

use std::ops::Range;

/// A word or a punctuation character of the code, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Token {
    pub(crate) text: String,
    /// From 1.
    pub(crate) line: usize,
}

/// A Rust file, taken apart.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) lines: Vec<String>,
    /// The code without comments, literals and lifetimes.
    pub(crate) tokens: Vec<Token>,
    /// Modules in files of their own that are declared under `#[cfg(test)]`.
    pub(crate) test_modules: Vec<String>,
    /// For each line, whether it belongs to an item under `#[cfg(test)]`.
    tests: Vec<bool>,
}

impl Source {
    pub(crate) fn parse(text: &str) -> Self {
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let tokens = tokens(text);
        let mut source = Self { tests: vec![false; lines.len()], lines, tokens, test_modules: Vec::new() };
        source.find_tests();
        source
    }

    /// Whether `line` (from 1) is test code.
    pub(crate) fn is_test(&self, line: usize) -> bool {
        self.tests.get(line - 1).copied().unwrap_or(false)
    }

    /// Makes the whole file test code.
    pub(crate) fn all_is_test(&mut self) {
        self.tests.fill(true);
    }

    /// Whether the token at `at` is `text`.
    pub(crate) fn is(&self, at: usize, text: &str) -> bool {
        self.tokens.get(at).is_some_and(|token| token.text == text)
    }

    /// Whether the tokens from `at` on are `::`.
    pub(crate) fn is_path_separator(&self, at: usize) -> bool {
        self.is(at, ":") && self.is(at + 1, ":")
    }

    fn find_tests(&mut self) {
        let mut at = 0;
        while at < self.tokens.len() {
            let Some(attribute) = self.attribute(at) else {
                at += 1;
                continue;
            };
            if !self.is_cfg_test(&attribute) {
                at = attribute.end;
                continue;
            }
            let item = attribute.end..self.item_end(attribute.end);
            let declaration = self.tokens[item.clone()].iter().position(|token| token.text == "mod");
            if let Some(position) = declaration.filter(|_| self.is(item.end - 1, ";")) {
                self.test_modules.push(self.tokens[item.start + position + 1].text.clone());
            }
            let last = self.tokens[item.end - 1].line;
            self.tests[self.tokens[at].line - 1..last].fill(true);
            at = item.end;
        }
    }

    /// The tokens of the outer attribute that starts at `at`.
    fn attribute(&self, at: usize) -> Option<Range<usize>> {
        if !(self.is(at, "#") && self.is(at + 1, "[")) {
            return None;
        }
        let mut depth = 0_u32;
        for (index, token) in self.tokens.iter().enumerate().skip(at + 1) {
            match token.text.as_str() {
                "[" => depth += 1,
                "]" if depth == 1 => return Some(at..index + 1),
                "]" => depth -= 1,
                _ => {}
            }
        }
        None
    }

    /// Whether it is `cfg(test)` or `cfg(all(.., test, ..))`: what is there in tests alone.
    fn is_cfg_test(&self, attribute: &Range<usize>) -> bool {
        let arguments = attribute.start + 4;
        let alone = self.is(arguments, "test") && self.is(arguments + 1, ")");
        let mut depth = 0_u32;
        let among = self.is(arguments, "all")
            && self.tokens[arguments..attribute.end].iter().any(|token| {
                match token.text.as_str() {
                    "(" => depth += 1,
                    ")" => depth = depth.saturating_sub(1),
                    _ => {}
                }
                depth == 1 && token.text == "test"
            });
        self.is(attribute.start + 2, "cfg") && self.is(attribute.start + 3, "(") && (alone || among)
    }

    /// One past the last token of the item that starts at `at`: its `;`, or the `}` of its body.
    fn item_end(&self, at: usize) -> usize {
        let mut depth = 0_i32;
        for (index, token) in self.tokens.iter().enumerate().skip(at) {
            match token.text.as_str() {
                "(" | "[" | "{" => depth += 1,
                ")" | "]" => depth -= 1,
                "}" => {
                    depth -= 1;
                    if depth <= 0 {
                        return index + 1;
                    }
                }
                ";" if depth == 0 => return index + 1,
                _ => {}
            }
        }
        self.tokens.len()
    }
}

/// The code's words and punctuation.
fn tokens(text: &str) -> Vec<Token> {
    let mut scanner = Scanner { rest: text, line: 1 };
    let mut tokens = Vec::new();
    while let Some(first) = scanner.rest.chars().next() {
        let line = scanner.line;
        if scanner.rest.starts_with("//") {
            scanner.skip(scanner.rest.find('\n').unwrap_or(scanner.rest.len()));
        } else if scanner.rest.starts_with("/*") {
            scanner.block_comment();
        } else if let Some(hashes) = scanner.raw_string() {
            scanner.past(&format!("\"{}", "#".repeat(hashes)));
        } else if first == '"' {
            scanner.skip(1);
            scanner.quoted('"');
        } else if first == '\'' {
            scanner.quote();
        } else if first.is_alphanumeric() || first == '_' {
            let word: String =
                scanner.rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            scanner.skip(word.len());
            tokens.push(Token { text: word, line });
        } else {
            scanner.skip(first.len_utf8());
            if !first.is_whitespace() {
                tokens.push(Token { text: first.to_string(), line });
            }
        }
    }
    tokens
}

struct Scanner<'a> {
    rest: &'a str,
    line: usize,
}

impl Scanner<'_> {
    fn skip(&mut self, bytes: usize) {
        let (over, rest) = self.rest.split_at(bytes);
        self.line += over.matches('\n').count();
        self.rest = rest;
    }

    fn past(&mut self, end: &str) {
        self.skip(self.rest.find(end).map_or(self.rest.len(), |at| at + end.len()));
    }

    /// Comments nest.
    fn block_comment(&mut self) {
        let mut depth = 0_u32;
        loop {
            if self.rest.starts_with("/*") {
                depth += 1;
                self.skip(2);
            } else if self.rest.starts_with("*/") {
                depth -= 1;
                self.skip(2);
            } else if let Some(next) = self.rest.chars().next() {
                self.skip(next.len_utf8());
            }
            if depth == 0 || self.rest.is_empty() {
                return;
            }
        }
    }

    /// Steps over the start of a raw string, if there is one, and gives the number of its hashes.
    fn raw_string(&mut self) -> Option<usize> {
        let after = ["r", "br", "cr"].iter().find_map(|prefix| self.rest.strip_prefix(prefix))?;
        let hashes = after.len() - after.trim_start_matches('#').len();
        let body = after[hashes..].strip_prefix('"')?;
        self.skip(self.rest.len() - body.len());
        Some(hashes)
    }

    /// Steps over what is left of a literal, its closing `end` included.
    fn quoted(&mut self, end: char) {
        while let Some(next) = self.rest.chars().next() {
            self.skip(next.len_utf8());
            if next == end {
                return;
            }
            if next == '\\' {
                self.skip(self.rest.chars().next().map_or(0, char::len_utf8));
            }
        }
    }

    /// Steps over a character literal, or a lifetime's name.
    fn quote(&mut self) {
        self.skip(1);
        let mut next = self.rest.chars();
        let is_character = matches!((next.next(), next.next()), (Some('\\'), _) | (Some(_), Some('\'')));
        if is_character {
            self.quoted('\'');
        } else {
            self.skip(self.rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(self.rest.len()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<(String, usize)> {
        let word = |token: &Token| token.text.starts_with(char::is_alphabetic);
        tokens(text).into_iter().filter(word).map(|token| (token.text, token.line)).collect()
    }

    #[test]
    fn comments_and_literals_hold_no_names() {
        let text = "a // no\n/* no /* no */ no */ b \"no \\\" no\n\" c r#\"no \" no\"# d b'\\'' e '\"' f<'no> g 'x' \"\" h";
        let expected =
            [("a", 1), ("b", 2), ("c", 3), ("d", 3), ("b", 3), ("e", 3), ("f", 3), ("g", 3), ("h", 3)];
        assert_eq!(words(text), expected.map(|(word, line)| (word.to_owned(), line)));
    }

    #[test]
    fn what_ends_nowhere_ends_the_file() {
        for text in
            ["a /*", "a \"", "a \"\\", "a r#\"b", "a '", "a '\\", "#[", "#[cfg(test)] mod", "#[cfg(test)]"]
        {
            let source = Source::parse(text);
            assert!(source.tokens.len() <= 8, "{text}");
        }
    }

    #[test]
    fn an_item_under_cfg_test_is_a_test_to_its_end() {
        let text = "use a;\n#[cfg(test)]\nuse b;\nfn c() {}\n#[cfg(all(not(loom), test))]\n#[must_use]\nfn d() -> [u8; 2] {\n{}\n}\n\
                    #[cfg(not(test))]\nfn e() {}\n#[cfg(any(test, loom))]\nfn f() {}\n\
                    #[cfg(all(unix, not(test)))]\nfn h() {}\n#[cfg(test)]\nmod g;\n";
        let source = Source::parse(text);
        let tests: Vec<_> = (1..=source.lines.len()).filter(|line| source.is_test(*line)).collect();
        assert_eq!(tests, [2, 3, 5, 6, 7, 8, 9, 16, 17]);
        assert_eq!(source.test_modules, ["g"]);
    }
}
