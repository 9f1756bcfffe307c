//! What a command prints under `--json`: one JSON object, with the keys that others rely on.

use serde_json::Value;

use crate::tree::Violation;

pub(crate) fn check(text: &str, keys: &[String]) -> Vec<Violation> {
    let violation = |text: String| Violation::new("standard output", 0, text);
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => keys
            .iter()
            .filter(|key| !object.contains_key(*key))
            .map(|key| violation(format!("has no key `{key}`, on which others rely")))
            .collect(),
        Ok(_) => vec![violation("is JSON but not an object".to_owned())],
        Err(error) => vec![violation(format!("is not one JSON object and nothing else: {error}"))],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_object_with_all_keys() {
        let count = |text| check(text, &["a".to_owned(), "b".to_owned()]).len();
        assert_eq!(count("{\"a\": 1, \"b\": null, \"c\": 2}\n"), 0);
        assert_eq!(count("{\"a\": 1}"), 1);
        assert_eq!(count("{}"), 2);
        for wrong in ["[]", "", "done\n{\"a\": 1, \"b\": 2}", "{\"a\": 1, \"b\": 2}\n{}"] {
            assert_eq!(count(wrong), 1, "{wrong}");
        }
    }
}
