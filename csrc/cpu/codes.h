// Messages in few bits: where their codes lie, and what the loops are given that make and read them. The equations are
// in gut_fast/kernels/codes.py, whose bits these loops give.
#pragma once

#include <cstdint>
#include <vector>

#include "gossip_step.h"

namespace gut_fast::cpu {

constexpr std::int64_t kCodeBlock = 256;  // numbers that share a scale or a width

// A row of codes: the heads of all blocks (scales; or widths, then check sums), then the codes, message after message.
struct CodeLayout {
  int bits;  // 16, 8 or 4
  bool is_modulo;
  int num_messages;
  std::vector<Segment> segments;                      // of one agent: columns, and where they begin in one message
  std::vector<std::int64_t> first_block, first_byte;  // of each segment in one message
  std::int64_t length = 0, blocks = 0, bytes = 0;     // of one message: numbers, blocks, bytes of codes

  CodeLayout(int bits, bool is_modulo, const std::vector<std::int64_t>& columns, int num_messages);

  std::int64_t num_blocks() const { return bits == 16 ? 0 : num_messages * blocks; }
  std::int64_t head_bytes() const { return num_blocks() * (is_modulo ? 8 : 4); }
  std::int64_t num_bytes() const { return head_bytes() + num_messages * bytes; }
};

// Two keys of the random numbers of one message of one agent.
struct CodeKeys {
  std::uint32_t first, second;
};

// The rows of a step's N agents, as ops.encode describes them.
struct Encoding {
  const CodeLayout* layout;
  std::uint8_t* const* coded;  // null for who is heard by nobody elsewhere
  float* const* copy;
  float* const* width;     // of a modulo code
  const CodeKeys* keys;    // [N * M], or null: rounded to the nearest
  std::uint32_t position;  // of the first column among the random numbers
};

// One row, as ops.decode describes it.
struct Decoding {
  const CodeLayout* layout;
  const std::uint8_t* coded;
  float* copy;
  const float* own;  // of a modulo code, with the next two
  const float* width;
  float* distance;
};

// What a tier's loops take: `count` numbers of one segment, from the beginning of a block on.
struct CodeArgs {
  int bits;
  bool is_modulo;
  std::int64_t count;
  const float* from;  // the message; decoding a modulo code the receiver's own copy
  float* copy;
  std::uint8_t* code;      // null: not wanted
  std::uint8_t* head;      // of the first block,
  std::int64_t next_head;  // and how many bytes after it its check sum is
  float* width;
  float* distance;
  const CodeKeys* keys;
  std::uint32_t position;  // of the first number
};

// What differs between the pieces of a row: the addresses of message m from a column of a segment on.
inline CodeArgs code_args(const CodeLayout& layout, std::int64_t segment, int m, std::int64_t column,
                          std::int64_t count, std::uint8_t* coded, float* copy, float* width) {
  const auto block = m * layout.blocks + layout.first_block[segment] + column / kCodeBlock;
  const auto byte = m * layout.bytes + layout.first_byte[segment] + column * layout.bits / 8;
  CodeArgs args{};
  args.bits = layout.bits;
  args.is_modulo = layout.is_modulo;
  args.count = count;
  args.copy = copy + m * layout.length + layout.segments[segment].state_offset + column;
  args.code = coded ? coded + layout.head_bytes() + byte : nullptr;
  args.head = coded ? coded + 4 * block : nullptr;
  args.next_head = 4 * layout.num_blocks();
  args.width = width ? width + block : nullptr;
  return args;
}

}  // namespace gut_fast::cpu
