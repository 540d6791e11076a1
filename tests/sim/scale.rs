//! How what an agent does and holds grows with the network: many agents, all real, on 1 % of loss and 20 ms of delay.
//!
//! `cargo lab scale` measures more and larger networks, and draws them; a test shows that some hundreds converge.

use crate::{
    ipam::{SECOND, World},
    mesh::{all_equal, all_know_all},
};
use plotters::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::{collections::BTreeSet, env, fs, time::Duration};
use weft::{ipam::seed::SeedPlan, mesh::machine::Input};

/// Of one network.
#[derive(Clone, Copy, Debug)]
struct Figures {
    nodes: f64,
    /// What an agent sends while nothing happens, in bytes/s of frames.
    idle: f64,
    /// Of an agent, in bytes.
    memory: f64,
    /// Of an agent while nothing happens, in seconds of a processor for each second.
    processor: f64,
    /// Until all know of a joiner, of one that has left, of all after a partition: in seconds.
    join: f64,
    leave: f64,
    heal: f64,
}

#[test]
fn hundreds_of_agents_hear_of_joiners_and_leavers_and_are_one_again_after_a_partition() {
    let sizes = env::var("WEFT_SCALE_SIZES").unwrap_or_else(|_| SIZES.into());
    let sizes = sizes.split(',').map(|size| size.trim().parse().expect("a number of nodes"));
    let all: Vec<Figures> = sizes.map(|nodes| measure(nodes, 1)).collect();
    println!(
        "{:>6} {:>12} {:>14} {:>14} {:>8} {:>8} {:>8}",
        "nodes", "idle, B/s", "memory, KiB", "CPU, us/s", "join, s", "leave, s", "heal, s"
    );
    for f in &all {
        let (memory, processor) = (f.memory / 1024.0, f.processor * 1e6);
        println!(
            "{:>6} {:>12.0} {memory:>14.0} {processor:>14.0} {:>8.2} {:>8.2} {:>8.2}",
            f.nodes, f.idle, f.join, f.leave, f.heal
        );
        assert!(f.join <= 5.0 && f.leave <= 5.0 && f.heal <= 10.0, "{f:?}");
    }
    for (what, of) in MEASURES {
        let points: Vec<_> = all.iter().map(|figures| (figures.nodes, of(figures))).collect();
        let (factor, exponent) = law(&points);
        println!("{what} grows with {factor:.3} n^{exponent:.2}");
    }
    if let Ok(file) = env::var("WEFT_SCALE_SVG") {
        fs::write(&file, draw(&all)).expect("the drawing is written");
    }
}

fn measure(nodes: usize, seed: u64) -> Figures {
    let (before, mut rng) = (resident(), ChaCha8Rng::seed_from_u64(seed));
    let mut world = World::new(seed, 3, None);
    world.sim.weather.delay = Duration::from_millis(19)..Duration::from_millis(21);
    world.sim.weather.loss = 0.01;
    while world.sim.nodes.len() < nodes {
        let there = world.sim.nodes.len();
        for _ in 0..there.min(nodes - there) {
            world.join(&[rng.random_range(0..there)], &SeedPlan::default());
        }
        world.sim.run(SECOND * 2);
    }
    let what = format!("{nodes} nodes, seed {seed}");
    world.sim.expect(&format!("{what}: all know all"), SECOND * 60, all_know_all);
    world.sim.expect(&format!("{what}: all is known to all"), SECOND * 60, all_equal);
    world.sim.run(SECOND * 10);

    let sent = |world: &World| world.sim.nodes.iter().map(|n| n.mesh.counters().bytes_out).sum::<u64>();
    let (bytes, busy) = (sent(&world), processor_time());
    world.sim.run(QUIET);
    let quiet = QUIET.as_secs_f64() * nodes as f64;
    let idle = (sent(&world) - bytes) as f64 / quiet;
    let processor = (processor_time() - busy).as_secs_f64() / quiet;
    let memory = resident().saturating_sub(before) as f64 / nodes as f64;

    world.join(&[rng.random_range(0..nodes)], &SeedPlan::default());
    let join = world.sim.expect(&format!("{what}: all know the joiner"), SECOND * 30, all_know_all);
    world.sim.run(SECOND * 5);
    world.sim.call(nodes, |app, now, out| app.leave(now, out));
    world.sim.run(SECOND);
    world.sim.handle(nodes, Input::Leave);
    let leave = world.sim.expect(&format!("{what}: all know who has left"), SECOND * 30, |sim| {
        sim.nodes[nodes].left && all_know_all(sim)
    });
    world.sim.run(SECOND * 5);

    let (left, right): (BTreeSet<_>, BTreeSet<_>) = (0..=nodes).partition(|_| rng.random_bool(0.5));
    world.sim.weather.groups = vec![left, right];
    world.sim.run(SECOND * 5);
    // Something happens on both sides meanwhile.
    (0..nodes).step_by(nodes / 10 + 1).for_each(|n| _ = world.attach(n));
    world.sim.run(SECOND * 5);
    world.sim.weather.groups.clear();
    let heal = world.sim.expect(&format!("{what}: all is known to all again"), SECOND * 60, |sim| {
        all_know_all(sim) && all_equal(sim)
    });
    world.check();
    let [join, leave, heal] = [join, leave, heal].map(|took| took.as_secs_f64());
    Figures { nodes: nodes as f64, idle, memory, processor, join, leave, heal }
}

/// The factor and the exponent of the law that fits best: least squares of the logarithms.
fn law(points: &[(f64, f64)]) -> (f64, f64) {
    let logs: Vec<_> = points.iter().filter(|(_, y)| *y > 0.0).map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let slope = logs.iter().map(|p| (p.0 - x) * (p.1 - y)).sum::<f64>()
        / logs.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>();
    ((y - slope * x).exp(), slope)
}

/// A panel for each measure, both axes logarithmic.
fn draw(all: &[Figures]) -> String {
    let mut drawing = String::new();
    {
        let root = SVGBackend::with_string(&mut drawing, (960, 640)).into_drawing_area();
        root.fill(&WHITE).expect("a drawing");
        for (area, (what, of)) in root.split_evenly((2, 3)).iter().zip(MEASURES) {
            let points: Vec<_> = all.iter().map(|f| (f.nodes, of(f).max(f64::MIN_POSITIVE))).collect();
            let (_, exponent) = law(&points);
            let most = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).fold(0.0, f64::max) * 2.0;
            let least = points.iter().map(|p| p.1).fold(f64::MAX, f64::min) / 2.0;
            let mut chart = ChartBuilder::on(area)
                .caption(format!("{what}: n^{exponent:.2}"), ("sans-serif", 15))
                .margin(10)
                .x_label_area_size(24)
                .y_label_area_size(64)
                .build_cartesian_2d((5f64..most(|p| p.0)).log_scale(), (least..most(|p| p.1)).log_scale())
                .expect("a chart");
            chart.configure_mesh().light_line_style(TRANSPARENT).draw().expect("axes");
            chart.draw_series([PathElement::new(points.clone(), INK)]).expect("a line");
            let dot = |point: &(f64, f64)| Circle::new(*point, 3, INK.filled());
            chart.draw_series(points.iter().map(dot)).expect("points");
        }
        root.present().expect("a drawing");
    }
    drawing
}

/// Memory of this process, in bytes.
fn resident() -> usize {
    let pages = fs::read_to_string("/proc/self/statm").expect("proc is mounted");
    pages.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok()).expect("a number") * 4096
}

/// What this thread has had of processors.
fn processor_time() -> Duration {
    let stat = fs::read_to_string("/proc/thread-self/schedstat").expect("proc is mounted");
    let spent = stat.split_whitespace().next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(spent.expect("a number"))
}

type Measure = (&'static str, fn(&Figures) -> f64);

const MEASURES: [Measure; 6] = [
    ("idle traffic of an agent, B/s", |f| f.idle),
    ("memory of an agent, B", |f| f.memory),
    ("idle processor time of an agent, s/s", |f| f.processor),
    ("a joiner is known to all, s", |f| f.join),
    ("a leaver is known to all, s", |f| f.leave),
    ("healed after a partition, s", |f| f.heal),
];

const INK: RGBColor = RGBColor(0, 122, 135);
/// Of the networks in the test.
const SIZES: &str = "10,30,100,200";
const QUIET: Duration = Duration::from_secs(30);
