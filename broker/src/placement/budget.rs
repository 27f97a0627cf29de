//! How many requests may be made twice: a share of all, so that repeating cannot multiply the load of a
//! service that already has too much. Pure.

#[cfg(test)]
mod tests;

/// What one repetition costs, in what a request earns.
const COST: u32 = 5;

/// Most that is saved, and what there is at the start: ten repetitions.
const MOST: u32 = 10 * COST;

/// The repetitions that one model's requests may have: one for every five requests, and up to ten saved.
#[derive(Debug, Clone)]
pub struct Budget(u32);

impl Default for Budget {
    fn default() -> Self {
        Self(MOST)
    }
}

impl Budget {
    /// A request came.
    pub fn earn(&mut self) {
        self.0 = (self.0 + 1).min(MOST);
    }

    /// Takes one repetition, if there is one.
    pub fn spend(&mut self) -> bool {
        let left = self.0.checked_sub(COST);
        self.0 = left.unwrap_or(self.0);
        left.is_some()
    }
}
