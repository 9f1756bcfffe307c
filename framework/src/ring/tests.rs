use super::*;

#[test]
fn smoke() {
    let (tx, rx) = mpmc(3);
    for n in 0..3 {
        tx.push(n.to_string()).unwrap();
    }
    assert_eq!(tx.push("x".into()), Err("x".into()));
    assert_eq!(rx.pop(), Some("0".into()));
    tx.push("3".into()).unwrap();
    let mut burst = Burst::with_capacity(2);
    assert_eq!(rx.pop_burst(&mut burst), 2);
    assert_eq!(burst[..], ["1", "2"]);
    assert_eq!(rx.len(), 1);
}
