//! A small cache that forgets what was used longest ago.
//!
//! The bound is a cost given with each value (bytes, or 1 for handles), so that a cache can never hold more than it may.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::{Mutex, MutexGuard},
};

pub struct Lru<K, V> {
    inner: Mutex<Inner<K, V>>,
    cost_max: usize,
}

struct Inner<K, V> {
    values: HashMap<K, Slot<V>>,
    /// Use number → key, oldest first.
    order: BTreeMap<u64, K>,
    next_use: u64,
    cost: usize,
}

struct Slot<V> {
    value: V,
    cost: usize,
    used: u64,
}

impl<K: Hash + Eq + Clone, V: Clone> Lru<K, V> {
    pub fn new(cost_max: usize) -> Self {
        let inner = Inner { values: HashMap::new(), order: BTreeMap::new(), next_use: 0, cost: 0 };
        Self { inner: Mutex::new(inner), cost_max }
    }
    fn lock(&self) -> MutexGuard<'_, Inner<K, V>> {
        self.inner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
    pub fn get(&self, key: &K) -> Option<V> {
        let mut inner = self.lock();
        let now = inner.next_use;
        inner.next_use += 1;
        let slot = inner.values.get_mut(key)?;
        let (value, before) = (slot.value.clone(), std::mem::replace(&mut slot.used, now));
        inner.order.remove(&before);
        inner.order.insert(now, key.clone());
        Some(value)
    }
    /// Keeps the value unless it alone is above the bound.
    pub fn put(&self, key: K, value: V, cost: usize) {
        if cost > self.cost_max {
            return;
        }
        let mut inner = self.lock();
        inner.forget(&key);
        while inner.cost + cost > self.cost_max {
            let Some((_, oldest)) = inner.order.pop_first() else { break };
            if let Some(slot) = inner.values.remove(&oldest) {
                inner.cost -= slot.cost;
            }
        }
        let used = inner.next_use;
        inner.next_use += 1;
        inner.order.insert(used, key.clone());
        inner.values.insert(key, Slot { value, cost, used });
        inner.cost += cost;
    }
    pub fn remove(&self, key: &K) {
        self.lock().forget(key);
    }
}

impl<K: Hash + Eq + Clone, V> Inner<K, V> {
    fn forget(&mut self, key: &K) {
        if let Some(slot) = self.values.remove(key) {
            self.order.remove(&slot.used);
            self.cost -= slot.cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_used_longest_ago_goes_first_and_the_bound_holds() {
        let cache = Lru::new(10);
        for i in 0..5u32 {
            cache.put(i, i * 10, 3);
            assert!(cache.lock().cost <= 10);
        }
        assert_eq!((cache.get(&0), cache.get(&1), cache.get(&2)), (None, None, Some(20)));
        cache.put(9, 90, 3); // 3 is older than 2 now
        assert_eq!((cache.get(&2), cache.get(&3), cache.get(&4), cache.get(&9)), (Some(20), None, Some(40), Some(90)));
        cache.put(7, 0, 11);
        assert_eq!(cache.get(&7), None);
        cache.put(9, 91, 1);
        cache.remove(&2);
        cache.remove(&4);
        let inner = cache.lock();
        assert_eq!((inner.cost, inner.order.len(), inner.values.len()), (1, 1, 1));
    }
}
