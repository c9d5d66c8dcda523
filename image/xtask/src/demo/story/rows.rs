//! The committing client, and what it may find afterwards.
//!
//! A row is a number and a word that nobody else has. The table has no key and no constraint: what is lost and what is there twice is found by
//! comparing, not prevented by the database.

use anyhow::{Result, bail, ensure};
use hw_tests::{Draw, postgres::Client};
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// A server that says nothing for so long is given up, and tried again.
const ANSWER_MAX: Duration = Duration::from_secs(4);
const BETWEEN_ROWS: Duration = Duration::from_millis(100);
const BEFORE_ANOTHER_TRY: Duration = Duration::from_millis(200);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    pub number: u64,
    pub word: String,
}

/// A row whose commit the client was told, and when that was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    pub row: Row,
    pub at_us: u64,
}

#[derive(Default)]
struct Seen {
    committed: Vec<Committed>,
    /// Sent, and no answer came: it may be there or not.
    in_doubt: Vec<Row>,
    wrong: Option<String>,
}

/// Commits rows at an address until it is dropped, whoever serves there, with another connection whenever one has ended.
pub struct Writer {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub fn start(at: SocketAddr) -> Self {
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), Arc::new(AtomicBool::new(false)));
        let (for_thread, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            let mut draw = Draw::new(super::now_us());
            while !stopped.load(Ordering::Relaxed) {
                // Nobody serves there now; somebody will.
                if let Ok(client) = Client::connect(at, ANSWER_MAX) {
                    commit(client, &for_thread, &stopped, &mut draw);
                }
                thread::sleep(BEFORE_ANOTHER_TRY);
            }
        });
        Self { seen, stop, thread: Some(thread) }
    }

    fn seen<T>(&self, look: impl FnOnce(&Seen) -> T) -> Result<T> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match &seen.wrong {
            Some(wrong) => bail!("the client: {wrong}"),
            None => Ok(look(&seen)),
        }
    }
    pub fn count(&self) -> Result<usize> {
        self.seen(|s| s.committed.len())
    }
    /// Those from a place of the list on.
    pub fn committed(&self, from: usize) -> Result<Vec<Committed>> {
        self.seen(|s| s.committed.get(from..).unwrap_or_default().to_vec())
    }
    /// Ends it; what it was told, and what it does not know.
    pub fn stop(mut self) -> Result<(Vec<Committed>, Vec<Row>)> {
        self.join()?;
        self.seen(|s| (s.committed.clone(), s.in_doubt.clone()))
    }
    fn join(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().is_none_or(|t| t.join().is_ok());
        ensure!(ended, "the client panicked");
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(e) = self.join() {
            eprintln!("{e:#}");
        }
    }
}

/// Over one connection, until it ends.
fn commit(mut client: Client, seen: &Mutex<Seen>, stop: &AtomicBool, draw: &mut Draw) {
    let lock = || seen.lock().unwrap_or_else(PoisonError::into_inner);
    let Ok(last) = client.query("select coalesce(max(number), 0) from story") else { return };
    let last = last.first().and_then(|row| row.first()).and_then(|n| n.parse::<u64>().ok());
    let Some(mut number) = last else {
        lock().wrong = Some("the last number in the table is none".into());
        return;
    };
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let row = Row { number, word: format!("{:016x}", draw.word()) };
        let sql = format!("insert into story values ({number}, '{}')", row.word);
        match client.query(&sql) {
            Ok(_) => lock().committed.push(Committed { row, at_us: super::now_us() }),
            Err(_) => {
                lock().in_doubt.push(row);
                return;
            }
        }
        thread::sleep(BETWEEN_ROWS);
    }
}

/// All rows that are there.
pub fn table(at: SocketAddr) -> Result<Vec<Row>> {
    let mut client = Client::connect(at, ANSWER_MAX)?;
    let rows = client.query("select number, word from story order by number, word")?;
    rows.into_iter()
        .map(|values| match &values[..] {
            [number, word] => Ok(Row { number: number.parse()?, word: word.clone() }),
            other => bail!("a row of {} values", other.len()),
        })
        .collect()
}

/// What the comparison came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Places of those committed rows that are not there.
    pub lost: Vec<usize>,
    /// Sent without an answer, and there.
    pub unanswered: usize,
}

/// Every row there is was sent, and is there once; each number from one on is there once. Says which committed rows are missing.
pub fn compare(table: &[Row], committed: &[Committed], in_doubt: &[Row]) -> Result<Outcome> {
    let mut there: BTreeMap<&str, &Row> = BTreeMap::new();
    for row in table {
        ensure!(there.insert(&row.word, row).is_none(), "row {} ({}) is there twice", row.number, row.word);
    }
    for (i, row) in table.iter().enumerate() {
        ensure!(row.number == i as u64 + 1, "after number {i} comes {}: one is missing or there twice", row.number);
    }
    let mut lost = Vec::new();
    let mut known = 0;
    for (place, c) in committed.iter().enumerate() {
        match there.get(c.row.word.as_str()) {
            Some(row) => {
                ensure!(**row == c.row, "row {:?} has become {row:?}", c.row);
                known += 1;
            }
            None => lost.push(place),
        }
    }
    let unanswered = in_doubt.iter().filter(|row| there.get(row.word.as_str()).is_some_and(|r| r == row)).count();
    ensure!(
        known + unanswered == table.len(),
        "{} rows are there, of which nobody has sent {}",
        table.len(),
        table.len() - known - unanswered
    );
    Ok(Outcome { lost, unanswered })
}

/// The longest time between two rows that follow each other, from a place of the list on.
pub fn longest_pause_us(committed: &[Committed], from: usize) -> Option<u64> {
    let times: Vec<u64> = committed.iter().skip(from).map(|c| c.at_us).collect();
    times.windows(2).map(|w| w[1].saturating_sub(w[0])).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(number: u64, word: &str) -> Row {
        Row { number, word: word.into() }
    }
    fn told(rows: &[Row]) -> Vec<Committed> {
        (1..).zip(rows).map(|(i, row)| Committed { row: row.clone(), at_us: i * 10 }).collect()
    }

    #[test]
    fn lost_rows_are_named_and_a_row_twice_altered_or_of_nobody_is_found() {
        let rows = [row(1, "a"), row(2, "b"), row(3, "c"), row(3, "d")];
        // The third was lost with its machine, its number used again; the next was never answered.
        let table = [row(1, "a"), row(2, "b"), row(3, "d"), row(4, "e")];
        let doubt = [row(3, "x"), row(4, "e")];
        assert_eq!(compare(&table, &told(&rows), &doubt).unwrap(), Outcome { lost: vec![2], unanswered: 1 });
        for (bad, says) in [
            (vec![row(1, "a"), row(2, "a")], "twice"),
            (vec![row(1, "a"), row(1, "b")], "comes 1"),
            (vec![row(1, "a"), row(3, "d")], "comes 3"),
            (vec![row(1, "b"), row(2, "a")], "has become"),
            (vec![row(1, "z")], "nobody"),
        ] {
            let found = compare(&bad, &told(&rows), &doubt).unwrap_err().to_string();
            assert!(found.contains(says), "{found}");
        }
    }

    #[test]
    fn pauses_are_seen_from_a_place_on() {
        let mut list = told(&[row(1, "a"), row(2, "b"), row(3, "c"), row(4, "d")]);
        list[1].at_us = 500;
        list[2].at_us = 520;
        list[3].at_us = 600;
        assert_eq!(longest_pause_us(&list, 0), Some(490));
        assert_eq!(longest_pause_us(&list, 1), Some(80));
    }
}
