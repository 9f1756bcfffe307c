use super::*;

#[test]
fn a_pool_gives_what_it_has() {
    let _slot = Slot::claim();
    let pool = Pool::builder(100).cache(16).build().unwrap();
    let mut burst = Burst::with_capacity(128);
    assert_eq!(pool.alloc_burst(128, &mut burst), 100);
    assert_eq!((pool.exhausted(), pool.outstanding()), (28, 100));
    burst.free();
    assert_eq!((pool.available(), burst.len()), (100, 0));
}
