//! Taking a lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks. A panic elsewhere does not make the data unusable: every critical section of this crate
/// leaves it whole at each point that can panic.
#[inline]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
