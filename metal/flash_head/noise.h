// noise: the Gumbel noise of a token, which follows from its id and the position's key

namespace flash_head {

constant constexpr float MOST_NOISE = 16.7f;  // above -log(-log(1 - 2^-24))
constant constexpr float LEAST_NOISE = -1e30f;

// Threefry-2x32 with 20 rounds of the counter (0, 1), as in MLX's random numbers.
inline uint2 threefry(uint key_0, uint key_1) {
  const uint keys[3] = {key_0, key_1, key_0 ^ key_1 ^ 0x1bd11bdau};
  const uint turns[8] = {13, 15, 26, 6, 17, 29, 16, 24};
  uint2 bits = uint2(keys[0], 1u + keys[1]);
  FLASH_HEAD_UNROLL
  for (int i = 0; i < 20; i++) {
    bits.x += bits.y;
    bits.y = ((bits.y << turns[i % 8]) | (bits.y >> (32 - turns[i % 8]))) ^ bits.x;
    if (i % 4 == 3) {
      bits.x += keys[(i / 4 + 1) % 3];
      bits.y += keys[(i / 4 + 2) % 3] + i / 4 + 1;
    }
  }
  return bits;
}

// The Gumbel noise of a token: the numbers of mx.random.uniform(shape=(2,), key) for each pair.
inline float noise_of(uint token, uint key_0, uint key_1) {
  const uint2 pair = threefry(key_0 + token / 2, key_1);
  const uint bits = token % 2 == 0 ? pair.x : pair.y;
  const float uniform = min(float(bits) / 4294967296.0f, 0.99999994f);
  return bits == 0 ? LEAST_NOISE : -log(-log(uniform));
}

}  // namespace flash_head
