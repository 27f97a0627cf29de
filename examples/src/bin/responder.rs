//! A device that can be asked to do something: it answers calls to a service.

use anyhow::Result;
use selvedge_client::{Code, IncomingCall, Status};
use selvedge_examples::connect;

#[tokio::main]
async fn main() -> Result<()> {
    let (client, _) = connect("").await?;
    let mut calls = client.serve("press/7/set-speed").await?;
    while let Some(call) = calls.next().await {
        tokio::spawn(answer(call));
    }
    Ok(())
}

async fn answer(mut call: IncomingCall) {
    let answered = match call.request().await {
        Ok(request) => match std::str::from_utf8(&request).map(str::parse::<u32>) {
            Ok(Ok(speed)) if speed <= 3000 => call.reply(format!("speed is {speed}")).await,
            _ => {
                let why = "expected a speed of 0 to 3000 turns a minute";
                call.fail(Status::new(Code::InvalidArgument, why)).await
            }
        },
        Err(gone) => Err(gone),
    };
    // A caller that has given up meanwhile is no fault of this device.
    drop(answered);
}
