//! A block server on what is another machine for packets, whose cable is pulled: nobody is told, packets just vanish.
//!
//! `UHMM_ROUNDS=50` makes it long. Root only: networks are made.

use std::time::{Duration, Instant};

use uhmm_tests::block::{BlockServer, Kind};
use uhmm_tests::far::*;
use uhmm_tests::network::Network;
use uhmm_tests::pattern::{Rng, spin};

/// In the middle of transfers, for a moment up to a second.
#[test]
fn integration_nbd_a_cable_that_is_pulled_and_put_back_costs_time() {
    let network = Network::new();
    let server = BlockServer::start(Kind::nbdkit_in(&network, &["memory", "64M"]));
    let scene = Scene::over(&[&server], QUICK);
    let mut rng = Rng::new(7);
    for round in 0..rounds(4) {
        let seed = round / 2 + 1;
        if round % 2 == 0 {
            scene.fill(seed);
        }
        let (steps, away) = (rng.below(2_000_000), Duration::from_millis(rng.below(1000)));
        std::thread::scope(|scope| {
            let puller = scope.spawn(|| {
                spin(steps);
                network.cut();
                // How long it is away is what is varied here.
                std::thread::sleep(away);
                network.mend();
            });
            if round % 2 == 0 {
                scene.try_out();
            } else {
                assert_eq!(scene.home(), Vec::<u64>::new(), "round {round}: {}", scene.bed.log());
            }
            puller.join().expect("put back");
        });
        if round % 2 == 1 {
            scene.compare(seed, &format!("round {round}"));
        }
    }
    scene.nothing_is_lost();
}

/// One of two servers is cut off for good: the other one has everything. A job waits until that is known, longer than a unit may stay inside the
/// gate, and a fault does not wait as long as it does for the only server.
#[test]
fn integration_nbd_of_two_servers_one_is_cut_off() {
    let network = Network::new();
    let there = BlockServer::start(Kind::nbdkit_in(&network, &["memory", "64M"]));
    let here = BlockServer::start(Kind::nbdkit(&["memory", "64M"]));
    let scene = Scene::over(&[&there, &here], &format!("{QUICK}\nreplicas = 2"));
    scene.out();
    network.cut();
    let begun = Instant::now();
    scene.sum(1);
    scene.compare(1, "without one of them");
    // An only server is given up after 30 s of silence.
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}: {}", begun.elapsed(), scene.bed.log());
    scene.fill(2);
    scene.out();
    scene.sum(2);
    scene.out();
    scene.wait_metrics(|away, behind| away == 1 && behind > 0);
    network.mend();
    scene.wait_metrics(|away, behind| away == 0 && behind == 0);
    // And it has all of them now.
    here.kill();
    assert_eq!(scene.home(), Vec::<u64>::new(), "{}", scene.bed.log());
    scene.compare(2, "from the one that was cut off");
    scene.nothing_is_lost();
}
