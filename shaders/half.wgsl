// What WGSL units with f16 storage use besides; appended after common.wgsl.

// x in the storage type, to nearest, ties to even. Rounded by hand first: drivers may round towards zero.
fn stored(x: f32) -> Stored {
    return Stored(f16_rounded(x));
}

// The f32 that f16 holds for x.
fn f16_rounded(x: f32) -> f32 {
    let sign = bitcast<u32>(x) & 0x80000000u;
    let magnitude = bitcast<u32>(x) & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return x;
    }
    if magnitude >= 0x477ff000u {
        return bitcast<f32>(sign | 0x7f800000u);
    }
    if magnitude < 0x38800000u {
        // below 2^-14 the last place of f32 beside 0.5 is that of f16's subnormals
        let places = bitcast<u32>(bitcast<f32>(magnitude) + 0.5) - 0x3f000000u;
        return bitcast<f32>(sign | bitcast<u32>(f32(places) * 5.9604644775390625e-8));
    }
    return bitcast<f32>(sign | ((magnitude + 0xfffu + ((magnitude >> 13u) & 1u)) & 0xffffe000u));
}
