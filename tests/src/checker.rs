//! The delivery contract under attack: clients publish numbered messages while the broker is killed,
//! stopped, cut off and robbed of its power, and a ledger says what became of each.

pub mod ledger;
