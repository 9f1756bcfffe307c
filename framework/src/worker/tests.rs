use std::sync::mpsc;
use std::time::Instant;

use super::*;

fn config(name: &str) -> WorkerConfig {
    WorkerConfig { name: name.to_owned(), core: None, idle: Idle::Adaptive }
}

/// The line of this thread's status in /proc that starts with `key`.
fn status_of_this_thread(key: &str) -> String {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_once('\t').unwrap().1.to_owned()
}

#[test]
fn a_worker_runs_on_its_core_under_its_name() {
    let core = *cores().last().expect("this process runs somewhere");
    let (send, receive) = mpsc::channel();
    let worker =
        Worker::spawn(WorkerConfig { core: Some(core), ..config("soft:dsa/engine12") }, move |context| {
            let seen =
                (status_of_this_thread("Cpus_allowed_list"), status_of_this_thread("Name"), cores().len());
            assert_eq!((context.name(), context.core()), ("soft:dsa/engine12", Some(core)));
            send.send(seen).unwrap();
            Work::Finished
        })
        .unwrap();
    let listed = cores().len();
    assert_eq!(receive.recv().unwrap(), (core.to_string(), "ft:dsa/engine12".to_owned(), listed));
    assert_eq!((worker.name(), worker.core()), ("soft:dsa/engine12", Some(core)));
    worker.join().unwrap();
}

#[test]
fn a_core_that_does_not_exist_is_an_error_that_lists_those_that_do() {
    // 1024 and more make core_affinity abort the process if they ever get to it.
    for core in [1023, 1024, 5000, usize::MAX] {
        let error =
            Worker::spawn(WorkerConfig { core: Some(core), ..config("w") }, |_| Work::Finished).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let text = error.to_string();
        assert!(
            text.contains(&format!("core {core}")) && text.contains(&Ranges(cores()).to_string()),
            "{text}"
        );
    }
}

#[test]
fn core_lists_read_as_people_write_them() {
    assert_eq!(Ranges(&[0, 1, 2, 3]).to_string(), "0-3");
    assert_eq!(Ranges(&[0, 2, 3, 9]).to_string(), "0,2-3,9");
    assert_eq!(Ranges(&[]).to_string(), "");
}

#[test]
fn stop_ends_it_and_the_counters_say_what_it_did() {
    for idle in [Idle::Busy, Idle::Pause, Idle::Adaptive] {
        let (mut left, (send, receive)) = (10, mpsc::channel());
        let worker = Worker::spawn(WorkerConfig { idle, ..config("counted") }, move |context| {
            if left == 0 {
                let _ = send.send(());
                return Work::Idle;
            }
            left -= 1;
            context.counters().add_items(3);
            Work::Busy
        })
        .unwrap();
        receive.recv().unwrap();
        let counters = worker.counters();
        assert!(!worker.is_finished());
        worker.stop();
        worker.join().unwrap();
        assert_eq!(counters.items(), 30);
        assert_eq!(counters.loops() - counters.idle_loops(), 10, "{idle:?}");
        assert!(counters.idle_loops() >= 1);
    }
}

#[test]
fn a_finished_worker_is_joined_without_being_stopped() {
    let worker = Worker::spawn(config("short"), |_| Work::Finished).unwrap();
    let counters = worker.counters();
    worker.join().unwrap();
    assert_eq!((counters.loops(), counters.idle_loops()), (1, 0));
}

#[test]
fn a_panic_is_reported_with_name_and_message_and_frees_what_the_body_owned() {
    let owned = Arc::new(());
    let kept = Arc::clone(&owned);
    let worker = Worker::spawn(config("rx7"), move |_| {
        assert!(Arc::strong_count(&kept) > 2, "descriptor {} is bad", 5);
        Work::Idle
    })
    .unwrap();
    let error = worker.join().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Gone);
    assert_eq!(
        error.to_string(),
        "cannot run worker rx7: it panicked: descriptor 5 is bad; start another; the panic is a bug in what it ran"
    );
    assert_eq!(Arc::strong_count(&owned), 1);
}

#[test]
fn a_panic_is_seen_before_the_join_and_dropping_does_not_hang() {
    let worker = Worker::spawn(config("early"), |_| panic!("plain text")).unwrap();
    let start = Instant::now();
    while worker.failure().is_none() {
        assert!(start.elapsed() < Duration::from_secs(30));
        thread::yield_now();
    }
    assert!(worker.failure().unwrap().to_string().contains("it panicked: plain text;"));
    drop(worker);
}

#[test]
fn a_panic_in_dropping_the_body_is_reported_too() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("in drop");
        }
    }
    let bomb = Bomb;
    let worker = Worker::spawn(config("bomb"), move |_| {
        let _bomb = &bomb;
        Work::Finished
    })
    .unwrap();
    assert!(worker.join().unwrap_err().to_string().contains("in drop"));
}

#[test]
fn dropping_a_worker_stops_it() {
    let owned = Arc::new(());
    let kept = Arc::clone(&owned);
    drop(Worker::spawn(config("dropped"), move |_| {
        assert_eq!(Arc::strong_count(&kept), 2);
        Work::Idle
    }));
    assert_eq!(Arc::strong_count(&owned), 1, "the thread is gone, and its body with it");
}

#[test]
fn the_sleeps_of_adaptive_double_up_to_a_millisecond() {
    let micros = (0..7).map(|n| Idler::sleep_after(n).as_micros());
    assert_eq!(micros.collect::<Vec<_>>(), [50, 100, 200, 400, 800, 1000, 1000]);
    assert_eq!(Idler::sleep_after(u32::MAX), Duration::from_millis(1));
}

#[test]
fn adaptive_sleeps_only_after_spinning_and_starts_over_after_work() {
    let mut idler = Idler::new(Idle::Adaptive);
    let before_sleep = Idler::SPINS + Idler::YIELDS;
    for _ in 0..before_sleep {
        idler.idle();
    }
    let start = Instant::now();
    (0..5).for_each(|_| idler.idle());
    assert!(start.elapsed() >= Duration::from_micros(50 + 100 + 200 + 400 + 800));
    idler.reset();
    assert_eq!(idler.calls, 0);
    idler.calls = u32::MAX;
    idler.idle();
    assert_eq!(idler.calls, u32::MAX, "it sleeps on, however long nothing comes");
}

#[test]
fn kernel_names_keep_the_end_whole() {
    assert_eq!(kernel_name("rx0"), "rx0");
    assert_eq!(kernel_name("0000:3b:00.0/rx15"), "00:3b:00.0/rx15");
    assert_eq!(kernel_name("µµµµµµµµ"), "µµµµµµµ", "no half characters");
    assert_eq!(kernel_name("a\0b"), "ab");
}
