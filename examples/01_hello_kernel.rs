//! One kernel, recorded into a pass: Philox random numbers of counter 0 under key 0, whose bits are published.
//!
//!     cargo run --example 01_hello_kernel [DEVICE]
//!
//! prints (the first line names the device, the CPU unless another is asked for; the rest is the same on all of them)
//!
//!     cpu (…)
//!     bits    [6627e8d5, e169c58d, bc57ac4c, 9b00dbd8]
//!     normal  [0.9911, -0.9247, -0.6176, -0.4821]
//!     1 launch

use forback::Device;
use forback::kernels::philox::philox;

fn main() -> forback::Result<()> {
    // A device: cpu, wgpu, cuda, cuda-host, reference, or auto for the fastest that is here.
    let device = Device::open(std::env::args().nth(1).as_deref().unwrap_or("cpu"))?;
    println!("{}", device.info());

    // Inputs live on the device. Row i of the result depends on counter[i] and key[i] alone.
    let counter = device.upload_u32("counter", &[0, 0, 0, 0])?;
    let key = device.upload_u32("key", &[0, 0])?;

    // A pass collects launches and downloads; nothing runs before it is submitted.
    let mut pass = device.pass("hello");
    let out = philox(&mut pass, &counter, &key)?;
    let (bits, normal) = (pass.read(&out.bits)?, pass.read(&out.normal)?);
    let launches = pass.launches();
    let mut done = pass.submit()?;

    let bits = done.u32(bits)?;
    println!("bits    {bits:08x?}");
    println!("normal  {:.4?}", done.f32(normal)?);
    println!("{launches} launch");
    assert_eq!(bits, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8], "the known answer of Random123");
    Ok(())
}
