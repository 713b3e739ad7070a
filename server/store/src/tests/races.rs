//! Agents that share a bucket, one request at a time, in every order that a seed makes up.
//!
//! Each agent waits before each of its requests until the schedule lets it go on, so a collector may sleep anywhere while
//! others save, delete and collect. The schedule comes from a seed alone.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::BoxFuture;
use object_store::Result;
use serde_json::json;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinHandle;

use super::between::{Ask, Between, Wrapped};
use super::{NIC, TestAmbient, assert_all_whole, impatient, in_memory, limits, load, noise};
use crate::bucket::Bucket;
use crate::{Begin, CheckpointId, Store, StoreError};

/// Lets one agent make one request at a time.
#[derive(Debug)]
struct Turnstile {
    turns: Semaphore,
    /// It waits for its turn, or is done.
    rests: AtomicBool,
    rested: Notify,
}

impl Turnstile {
    fn new() -> Arc<Self> {
        Arc::new(Self { turns: Semaphore::new(0), rests: AtomicBool::new(false), rested: Notify::new() })
    }

    fn rest(&self) {
        self.rests.store(true, Ordering::SeqCst);
        self.rested.notify_one();
    }

    /// One request, and then all that follows from it until the next one.
    async fn turn(&self) {
        self.rests.store(false, Ordering::SeqCst);
        self.turns.add_permits(1);
        self.at_rest().await;
    }

    /// One request, unless the agent is done.
    async fn turn_or<T>(&self, agent: &JoinHandle<T>) {
        if !agent.is_finished() {
            self.turn().await;
            tokio::task::yield_now().await;
        }
    }

    async fn at_rest(&self) {
        while !self.rests.load(Ordering::SeqCst) {
            self.rested.notified().await;
        }
    }
}

impl Between for Turnstile {
    fn before(&self, _ask: Ask, _at: String) -> BoxFuture<'_, Result<()>> {
        Box::pin(async {
            self.rest();
            self.turns.acquire().await.expect("never closed").forget();
            Ok(())
        })
    }
}

/// A small generator, so that a seed says all.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or(0) % sides
    }
}

/// What the agents were told.
#[derive(Debug, Default)]
struct Told {
    committed: Vec<(CheckpointId, u64)>,
    failed: BTreeSet<CheckpointId>,
    deleted: BTreeSet<CheckpointId>,
    collected_chunks: u64,
    revoked: usize,
}

type Shared = Arc<Mutex<Told>>;

fn state_of(version: u64) -> Vec<u8> {
    // Much of it stays the same, so that saves build on each other.
    let mut state = noise(1, 120_000);
    state.extend(noise(version, 40_000));
    state
}

async fn saver(store: Store, told: Shared, seed: u64) {
    for round in 0..2 {
        let version = 2 + (seed + round) % 2;
        let id = store.new_id();
        let saved = save_one(&store, id, version).await;
        let mut told = told.lock().unwrap();
        match saved {
            Ok(()) => told.committed.push((id, version)),
            Err(StoreError::Revoked { .. }) => {
                told.revoked += 1;
                told.failed.insert(id);
            }
            Err(error) => panic!("a save fails: {error}"),
        }
    }
}

async fn save_one(store: &Store, id: CheckpointId, version: u64) -> Result<(), StoreError> {
    let begin = Begin { id, logical_devices: vec![NIC.to_owned()], reserve_bytes: 0 };
    let mut writer = store.begin(begin).await?;
    writer.chunk(0, state_of(version).into()).await?;
    writer.finish(0).await?;
    writer.commit(json!({})).await.map(drop)
}

async fn deleter(store: Store, told: Shared) {
    for _ in 0..4 {
        let page = store.list(None, 10).await.unwrap();
        let Some(last) = page.checkpoints.last() else { continue };
        match store.delete(last.id).await {
            Ok(()) => {
                told.lock().unwrap().deleted.insert(last.id);
            }
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => panic!("a delete fails: {error}"),
        }
    }
}

async fn collector(store: Store, told: Shared) {
    for _ in 0..2 {
        let collected = store.collect().await.unwrap();
        told.lock().unwrap().collected_chunks += collected.chunks;
    }
}

/// One run. `patience` is how long a writer may be silent.
async fn run(seed: u64, patience: Duration) -> Told {
    let ambient = TestAmbient::new();
    let (free, bucket) = in_memory(&ambient).await;
    let told: Shared = Arc::default();
    let first = free.new_id();
    save_one(&free, first, 2).await.unwrap();
    told.lock().unwrap().committed.push((first, 2));

    let mut turnstiles = Vec::new();
    let mut agents = Vec::new();
    for agent in 0..5_u64 {
        let turnstile = Turnstile::new();
        let store = behind(&bucket, &turnstile, patience, &ambient);
        let told = Arc::clone(&told);
        let done = Arc::clone(&turnstile);
        turnstiles.push(turnstile);
        agents.push(tokio::spawn(async move {
            match agent {
                0 | 1 => saver(store, told, agent).await,
                2 => deleter(store, told).await,
                _ => collector(store, told).await,
            }
            done.rest();
        }));
    }
    for turnstile in &turnstiles {
        turnstile.at_rest().await;
    }
    let mut dice = Dice(seed);
    loop {
        let going: Vec<usize> = (0..agents.len()).filter(|index| !agents[*index].is_finished()).collect();
        if going.is_empty() {
            break;
        }
        let chosen = going[dice.roll(going.len())];
        // Often for a while, so that others really sleep.
        for _ in 0..=[0, 1, 7, 40][dice.roll(4)] {
            turnstiles[chosen].turn_or(&agents[chosen]).await;
            if agents[chosen].is_finished() {
                break;
            }
        }
        // What a seed does to a clock.
        if dice.roll(10) == 0 {
            ambient.advance(Duration::from_secs(1));
        }
    }
    for agent in agents {
        agent.await.unwrap();
    }

    let listed: BTreeSet<CheckpointId> = assert_all_whole(&free).await.into_iter().collect();
    let told = std::mem::take(&mut *told.lock().unwrap());
    for (id, version) in &told.committed {
        if told.deleted.contains(id) {
            assert!(!listed.contains(id), "seed {seed}: {id} was deleted and is listed");
        } else {
            assert!(load(&free, *id, 0).await.unwrap() == state_of(*version), "seed {seed}: {id}");
        }
    }
    assert!(listed.is_disjoint(&told.failed), "seed {seed}: a save that was said to have failed is listed");

    // Whoever comes later finds everything in order, too, and in the end nothing is left over.
    for id in &listed {
        free.delete(*id).await.unwrap();
    }
    impatient(&free).collect().await.unwrap();
    impatient(&free).collect().await.unwrap();
    let left = bucket.list(&"chunks".into()).await.unwrap().len();
    assert_eq!(left, 0, "seed {seed}: chunks that nothing needs");
    told
}

fn behind(
    bucket: &Bucket,
    turnstile: &Arc<Turnstile>,
    patience: Duration,
    ambient: &Arc<TestAmbient>,
) -> Store {
    let gated = bucket.behind(|inner| Arc::new(Wrapped { inner, between: Arc::clone(turnstile) }));
    // One upload at a time: what an agent does between two turns is the same in each run.
    let limits = crate::Limits { parallel: 1, abandoned_after: patience, ..limits() };
    Store { bucket: gated, limits: Arc::new(limits), ambient: Arc::clone(ambient) as _ }
}

const SEEDS: u64 = 150;

#[tokio::test]
async fn agents_that_meet_lose_nothing() {
    let (mut collected, mut deleted, mut committed) = (0, 0, 0);
    for seed in 0..SEEDS {
        let told = run(seed, Duration::from_hours(24)).await;
        assert_eq!(told.revoked, 0);
        collected += told.collected_chunks;
        deleted += told.deleted.len();
        committed += told.committed.len();
    }
    assert_eq!(committed as u64, SEEDS * 5);
    assert!(collected > 0 && deleted > 0);
    println!(
        "figures: store: {SEEDS} schedules: {committed} saves, {deleted} deletes, {collected} chunks collected"
    );
}

#[tokio::test]
async fn a_writer_that_sleeps_for_too_long_is_revoked_or_wins() {
    let (mut revoked, mut committed) = (0, 0);
    for seed in 0..SEEDS {
        let told = run(seed, Duration::ZERO).await;
        revoked += told.revoked;
        committed += told.committed.len();
    }
    assert!(revoked > 0 && committed > 0, "{revoked} revoked, {committed} committed");
    println!(
        "figures: store: {SEEDS} schedules with impatient collectors: {committed} saves, {revoked} revoked"
    );
}

/// What is needed moves on while a collector looks for it: from a checkpoint to a writer that builds on it, to the checkpoint of
/// that writer, to the next writer. Tried out with the moves at every three requests of a collection.
#[tokio::test]
async fn what_moves_on_while_a_collector_looks_is_spared() {
    let mut runs = 0;
    let mut first = 0;
    loop {
        let mut longest = 0;
        let mut second = first;
        loop {
            let mut third = second;
            loop {
                let asked = moves(first, second, third).await;
                runs += 1;
                longest = longest.max(asked);
                third += 1;
                if third > longest {
                    break;
                }
            }
            second += 1;
            if second > longest {
                break;
            }
        }
        first += 1;
        if first > longest {
            break;
        }
    }
    assert!(runs > 200, "{runs}");
    println!("figures: store: {runs} collections during which what is needed moved on");
}

/// One collection. Before these requests of it the next moves are made. Returns how many requests it made.
async fn moves(first: usize, second: usize, third: usize) -> usize {
    let ambient = TestAmbient::new();
    let (free, bucket) = in_memory(&ambient).await;
    let base = free.new_id();
    save_one(&free, base, 2).await.unwrap();
    let turnstile = Turnstile::new();
    let store = behind(&bucket, &turnstile, Duration::from_hours(24), &ambient);
    let done = Arc::clone(&turnstile);
    let collector = tokio::spawn(async move {
        let collected = store.collect().await;
        done.rest();
        collected
    });
    turnstile.at_rest().await;

    let begin = |id| Begin { id, logical_devices: vec![NIC.to_owned()], reserve_bytes: 0 };
    let (next, last) = (free.new_id(), free.new_id());
    let (mut one, mut two) = (None, None);
    let mut asked = 0;
    loop {
        if asked == first {
            one = Some(free.begin(begin(next)).await.unwrap());
            free.delete(base).await.unwrap();
        }
        if asked == second {
            finish(one.take().unwrap()).await;
        }
        if asked == third {
            two = Some(free.begin(begin(last)).await.unwrap());
            free.delete(next).await.unwrap();
        }
        if collector.is_finished() && asked >= third {
            break;
        }
        turnstile.turn_or(&collector).await;
        asked += 1;
    }
    collector.await.unwrap().unwrap();
    finish(two.take().unwrap()).await;
    assert_eq!(assert_all_whole(&free).await, [last], "moves at {first}, {second} and {third}");
    asked
}

async fn finish(mut writer: crate::Writer) {
    writer.chunk(0, state_of(2).into()).await.unwrap();
    writer.finish(0).await.unwrap();
    writer.commit(json!({})).await.unwrap();
}
