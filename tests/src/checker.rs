//! The delivery contract under attack: clients publish numbered messages while the broker is killed,
//! held, cut off and robbed of its power, and a ledger says what became of each.

mod book;
pub mod ledger;
mod message;
pub mod plan;
mod program;
mod publisher;
mod reader;
mod run;
mod site;

pub use publisher::PublisherError;
pub use reader::ReaderError;
pub use run::{CheckError, Progress, Report, Settings, Span, check};
