//! A sensor: a stream of readings that may be lost, and an alarm that may not.

use std::time::Duration;

use anyhow::Result;
use selvedge_client::{Class, Publish, Qos};
use selvedge_examples::connect;

#[tokio::main]
async fn main() -> Result<()> {
    let (client, _) = connect("").await?;

    for reading in 0..60 {
        let temperature = 70.0 + f64::from(reading) / 4.0;
        // QoS 0: queued here, and dropped where someone is too slow. Lost connections are made
        // again without a word; `client.state()` tells an application that wants to know.
        client
            .publish("press/7/temperature", format!("{temperature:.2}"))
            .await?;

        if temperature > 80.0 {
            // QoS 1: returns when the broker has it. Alarms overtake everything else.
            let alarm = Publish::new("press/7/alarm", format!("too hot: {temperature:.2}"))
                .qos(Qos::AtLeastOnce)
                .class(Class::Alarm)
                .retain(true);
            client.publish_message(alarm).await?;
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    // Everything queued is sent before the client is gone.
    client.close().await;
    Ok(())
}
