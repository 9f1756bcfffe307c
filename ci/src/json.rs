//! What a command prints under `--json`: one JSON object, with the keys that others rely on, and values that must be.
//!
//! A claim is a path, keys and indices with dots between (`queues.1.pasid`), which must exist; `PATH=JSON`, where that
//! must be its value; or `PATH!=PATH`, whose values must exist and differ. `PATH.length` is an array's length.

use serde_json::Value;

use crate::tree::Violation;

pub(crate) fn check(text: &str, claims: &[String]) -> Vec<Violation> {
    let violation = |text: String| Violation::new("standard output", 0, text);
    match serde_json::from_str(text) {
        Ok(object @ Value::Object(_)) => {
            claims.iter().filter_map(|claim| broken(&object, claim)).map(violation).collect()
        }
        Ok(_) => vec![violation("is JSON but not an object".to_owned())],
        Err(error) => vec![violation(format!("is not one JSON object and nothing else: {error}"))],
    }
}

/// What is wrong with a claim, if something is.
fn broken(object: &Value, claim: &str) -> Option<String> {
    let missing = |path: &str| format!("has no key `{path}`, on which others rely");
    if let Some((one, other)) = claim.split_once("!=") {
        return match (find(object, one), find(object, other)) {
            (None, _) => Some(missing(one)),
            (_, None) => Some(missing(other)),
            (Some(a), Some(b)) => (a == b).then(|| format!("has {a} at both `{one}` and `{other}`")),
        };
    }
    let Some((path, expected)) = claim.split_once('=') else {
        return find(object, claim).is_none().then(|| missing(claim));
    };
    match (find(object, path), serde_json::from_str::<Value>(expected)) {
        (_, Err(error)) => Some(format!("cannot be compared with `{expected}`: {error}")),
        (None, _) => Some(missing(path)),
        (Some(found), Ok(expected)) => {
            (found != expected).then(|| format!("has {found} at `{path}`, not {expected}"))
        }
    }
}

fn find(object: &Value, path: &str) -> Option<Value> {
    path.split('.').try_fold(object.clone(), |value, part| match (&value, part) {
        (Value::Array(items), "length") => Some(items.len().into()),
        (Value::Array(items), index) => items.get(index.parse::<usize>().ok()?).cloned(),
        _ => value.get(part).cloned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(text: &str, claims: &[&str]) -> usize {
        let claims: Vec<_> = claims.iter().map(|claim| (*claim).to_owned()).collect();
        check(text, &claims).len()
    }

    #[test]
    fn one_object_with_all_keys() {
        let count = |text| count(text, &["a", "b"]);
        assert_eq!(count("{\"a\": 1, \"b\": null, \"c\": 2}\n"), 0);
        assert_eq!(count("{\"a\": 1}"), 1);
        assert_eq!(count("{}"), 2);
        for wrong in ["[]", "", "done\n{\"a\": 1, \"b\": 2}", "{\"a\": 1, \"b\": 2}\n{}"] {
            assert_eq!(count(wrong), 1, "{wrong}");
        }
    }

    #[test]
    fn values_are_compared() {
        let text = r#"{"ok": true, "failed": 0, "name": "x", "queues": [{"id": 1}, {"id": 2}, {"id": 1}]}"#;
        for right in [
            "ok=true",
            "failed=0",
            "name=\"x\"",
            "queues.length=3",
            "queues.1.id=2",
            "queues.0.id!=queues.1.id",
        ] {
            assert_eq!(count(text, &[right]), 0, "{right}");
        }
        for wrong in [
            "ok=false",
            "ok=1",
            "failed=null",
            "gone=0",
            "name=x",
            "queues.length=2",
            "queues.3.id",
            "queues.0.id!=queues.2.id",
            "queues.0.id!=queues.0.pasid",
            "queues.0.pasid!=queues.0.pasid",
        ] {
            assert_eq!(count(text, &[wrong]), 1, "{wrong}");
        }
    }
}
