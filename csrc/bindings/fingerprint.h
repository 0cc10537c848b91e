// SPDX-License-Identifier: Apache-2.0
//
// A sample of weights, which tells whether they have changed.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace stfpm_ext {

/// Address of a block of memory, its size in bytes, and how many rows of the same size it has.
using Block = std::array<uint64_t, 3>;

/// Adds up hashes of a word of each row, at places that differ, or of all words where rows are no larger. To hash all
/// of ResNet18's weights would take as long as its first layer.
inline uint64_t fingerprint(const Block* blocks, size_t num_blocks) {
  constexpr uint64_t kWord = sizeof(uint64_t), kMix = 0x9e3779b97f4a7c15;
  uint64_t hash = 0, salt = 0;
  const auto add = [&](uint64_t address, uint64_t size) {
    uint64_t word = 0;
    std::memcpy(&word, reinterpret_cast<const char*>(address), size);
    hash += ((word ^ salt) * kMix) >> 7 ^ word;
    salt += kMix;
  };
  for (const Block* block = blocks; block < blocks + num_blocks; ++block) {
    const auto& [address, size, rows] = *block;
    const uint64_t row = size / rows;
    if (row <= kWord) {
      uint64_t done = 0;
      for (; done + kWord <= size; done += kWord) add(address + done, kWord);
      if (done < size) add(address + done, size - done);
      continue;
    }
    const uint64_t places = row - kWord + 1, step = row * 5 / 8;
    for (uint64_t i = 0, place = 0; i < rows; ++i) {
      add(address + i * row + place, kWord);
      place += step;
      if (place >= places) place -= places;
    }
  }
  return hash;
}

}  // namespace stfpm_ext
