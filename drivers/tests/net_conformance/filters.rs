//! What is received: by address and by VLAN.

use underpass::ErrorKind;
use underpass::net::{Config, MacAddr, RxQueue};
use underpass_drivers::virtio_net::spec::Features;

use crate::rig::frames::Flow;
use crate::rig::{Bench, Wire, contents, pool};
use crate::{Kind, config, echo};

/// Sends these frames to the port, of which those with the names in `expected` are to arrive.
fn arrive(bench: &Bench, rx: &mut [Box<dyn RxQueue>], frames: &[(char, Flow)], expected: &str) {
    for (name, flow) in frames {
        bench.wire.send(0, flow.frame(&[*name as u8; 50]));
    }
    let arrived = bench.drain(rx, expected.len());
    // What an earlier test left in a cable is none of them.
    let name = |frame: Vec<u8>| frame.last().copied().filter(|name| frame.ends_with(&[*name; 50]));
    let names: String = arrived.iter().filter_map(|packet| name(contents(packet))).map(char::from).collect();
    assert_eq!(names, expected);
}

pub(super) fn addresses_are_filtered(kind: &Kind) {
    let mut bench = echo(kind);
    let pool = pool(256);
    let own = bench.port.mac();
    let other = MacAddr([2, 0x55, 0, 0, 0, 9]);
    let (extra, group, group2) =
        (MacAddr([2, 0x44, 0, 0, 0, 1]), MacAddr([1, 0, 0x5e, 0, 0, 1]), MacAddr([0x33, 0x33, 0, 0, 0, 1]));
    let mut started = bench.start(&Config { promiscuous: false, ..config(&pool) });
    let to = |mac: MacAddr| Flow { to: mac.octets(), ..Flow::udp4(1) };
    let frames = |own: MacAddr| {
        [
            ('o', to(own)),
            ('b', to(MacAddr([0xff; 6]))),
            ('x', to(MacAddr([2, 0x66, 0, 0, 0, 1]))),
            ('e', to(extra)),
            ('g', to(group)),
            ('h', to(group2)),
        ]
    };
    let rx = &mut started.rx;
    if kind.is_without(Features::CTRL_RX) {
        // A device that can not filter passes everything on, started so or not, and says so when asked.
        let port = &mut *bench.port;
        for refused in
            [port.set_promiscuous(false), port.set_all_multicast(false), port.set_mac_filter(&[extra])]
        {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
        }
        arrive(&bench, rx, &frames(own), "obxegh");
        assert_eq!(bench.port.set_mac(other).unwrap_err().kind(), ErrorKind::Unsupported);
        assert_eq!(bench.port.mac(), own);
        return bench.stop(started, &[&pool]);
    }
    arrive(&bench, rx, &frames(own), "ob");
    bench.port.set_all_multicast(true).unwrap();
    arrive(&bench, rx, &frames(own), "obgh");
    bench.port.set_all_multicast(false).unwrap();
    bench.port.set_mac_filter(&[extra, group]).unwrap();
    arrive(&bench, rx, &frames(own), "obeg");
    bench.port.set_mac_filter(&[group2]).unwrap();
    arrive(&bench, rx, &frames(own), "obh");
    bench.port.set_promiscuous(true).unwrap();
    arrive(&bench, rx, &frames(own), "obxegh");
    bench.port.set_promiscuous(false).unwrap();
    bench.port.set_mac_filter(&[]).unwrap();
    arrive(&bench, rx, &frames(own), "ob");

    match bench.port.set_mac(other) {
        Ok(()) => {
            assert_eq!(bench.port.mac(), other);
            arrive(&bench, rx, &frames(own), "b");
            arrive(&bench, rx, &frames(other), "ob");
            assert!(bench.port.set_mac(group).is_err(), "no port has a group's address");
            assert_eq!(bench.port.mac(), other);
        }
        Err(error) => assert_eq!((error.kind(), bench.port.mac()), (ErrorKind::Unsupported, own)),
    }
    bench.stop(started, &[&pool]);
    // The address that it says it has is the one that it receives, after a restart too; so are the others.
    bench.port.set_all_multicast(true).unwrap();
    bench.port.set_mac_filter(&[extra]).unwrap();
    let own = bench.port.mac();
    for (promiscuous, expected) in [(false, "obegh"), (true, "obxegh"), (false, "obegh")] {
        let mut started = bench.start(&Config { promiscuous, ..config(&pool) });
        arrive(&bench, &mut started.rx, &frames(own), expected);
        bench.stop(started, &[&pool]);
    }
}

pub(super) fn vlans_are_filtered(kind: &Kind) {
    let mut bench = kind.open(&Wire::new(1));
    let pool = pool(256);
    let config = Config { promiscuous: false, ..config(&pool) };
    let frames: Vec<_> = [('u', None), ('1', Some(1)), ('5', Some(0xe005)), ('9', Some(4094))]
        .map(|(name, vlan)| (name, Flow { vlan, ..Flow::udp4(1) }))
        .to_vec();
    let mut started = Some(bench.start(&config));
    let mut restarts = 0;
    for (id, on, arrives) in [
        (5, false, "u159"),
        (5, true, "u5"),
        (5, true, "u5"),
        (4094, true, "u59"),
        (5, false, "u9"),
        (4094, false, "u159"),
        (1, true, "u1"),
    ] {
        match bench.port.set_vlan_filter(id, on) {
            Err(error) if error.kind() == ErrorKind::Busy => {
                // It can begin and end filtering only while it is stopped.
                restarts += 1;
                bench.stop(started.take().unwrap(), &[&pool]);
                bench.port.set_vlan_filter(id, on).unwrap();
                started = Some(bench.start(&config));
            }
            Err(error) if kind.is_without(Features::CTRL_VLAN) => {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
            }
            result => result.unwrap(),
        }
        let arrives = if kind.is_without(Features::CTRL_VLAN) { "u159" } else { arrives };
        let rx = &mut started.as_mut().unwrap().rx;
        arrive(&bench, rx, &frames, arrives);
    }
    assert!(restarts <= 3);
    assert_eq!(bench.port.set_vlan_filter(4096, true).unwrap_err().kind(), ErrorKind::InvalidInput);
    bench.stop(started.unwrap(), &[&pool]);
}
