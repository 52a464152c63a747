// Convolution and pool in one pass: the map between them stays in registers.
//
// A warp owns 16 neighbouring columns of the convolution and 16 channels, and walks down the rows, two at a time: rows
// 2p and 2p + 1 end the window of pooled row p and 2p + 1 begins the next. The 16 columns hold the windows of 7 pooled
// columns; the next warp starts 14 columns on. Columns 1 to 14 count for the statistics, each of the map once.
#pragma once

#include "mma.h"
#include "statistics.h"

namespace ceit::i2t {

constexpr int kStrips = 2;         // warps side by side
constexpr int kPooledColumns = 7;  // of a warp
constexpr int kPooledRows = 4;     // pooled rows for which the image lies in shared memory
constexpr int kMaximumGroups = 4;  // of 16 output channels in a block; more are shared evenly by several
constexpr int kForwardThreads = 32 * kStrips * kMaximumGroups;
constexpr int kForwardImageRows = 2 * (2 * kPooledRows + 1) + 5;
constexpr int kForwardImageColumns = 2 * (14 * (kStrips - 1) + 15) + 8;

template <class Mma>
struct ForwardArguments {
  using Acc = typename Mma::Acc;
  const typename Mma::Element* weights;
  typename Mma::Output* out;  // (B, H', W', O)
  uint8_t* indices;           // (B, H', W', O): place of the maximum in its window, row by row
  Norm<Acc> norm;             // applied to the result where the statistics are given
  Moments<Acc> moments;       // of this call, one row for each warp side by side
  int rows_per_block;         // pooled
};

// The largest of a row of values and where it came from. PyTorch's rule: the first of equals, and NaN wins.
template <class Acc, bool kIndices>
DEVICE void take(Acc& best, unsigned& where, Acc value, unsigned place) {
  const bool larger = value > best || value != value;
  best = larger ? value : best;
  if constexpr (kIndices) where = larger ? place : where;
}

template <class Mma, class In, bool kTraining, bool kIndices>
KERNEL(kForwardThreads, Mma::kForwardBlocks)  // while one waits for its image, the other computes
forward_kernel(Problem p, const In* image, ForwardArguments<Mma> a) {
  using Acc = typename Mma::Acc;
  using Element = typename Mma::Element;
  SHARED_MEMORY(memory);
  Element* tile = reinterpret_cast<Element*>(memory);

  const int lane = lane_index(), warp = threadIdx.x / 32, strip = warp % kStrips;
  const int groups = blockDim.x / (32 * kStrips), parts = p.out_channels / (kGroup * groups);
  const int group = blockIdx.x % parts * groups + warp / kStrips, place = blockIdx.x / parts;
  const int blocks_across = (p.pooled_width + kStrips * kPooledColumns - 1) / (kStrips * kPooledColumns);
  const int64_t b = place / blocks_across;
  const int block_px = place % blocks_across * (kStrips * kPooledColumns);
  const int px0 = block_px + strip * kPooledColumns, x0 = 2 * px0 - 1;
  const int py_begin = blockIdx.y * a.rows_per_block;
  const int py_end = min(py_begin + a.rows_per_block, p.pooled_height);
  const int channel = group * kGroup + lane % 4 * kOwn;

  typename Mma::Weights weights[kSide];
#pragma unroll
  for (int ky = 0; ky < kSide; ++ky) weights[ky].load(a.weights + group * kGroup * kDepth, ky);

  const int column = lane / 4;  // this thread holds columns `column` and `column + 8` of the warp's 16
  const bool odd = column % 2;
  // This thread pools windows of the first 8 columns where `column` is even, of the last 8 where it is odd.
  const int pooled = odd ? 4 + column / 2 : column / 2, px = px0 + pooled;
  const bool writes = pooled < kPooledColumns && px < p.pooled_width;
  const bool has_left = px > 0, has_right = 2 * px + 1 < p.conv_width;
  const bool counts[2] = {column >= 1 && x0 + column < p.conv_width, column <= 6 && x0 + column + 8 < p.conv_width};

  // Where gamma is zero everything finite is equal: the first of a window wins, the rest of the way is beta's.
  Acc keep[kOwn];
  Affine<Acc> norms[kTraining ? 1 : kOwn];
#pragma unroll
  for (int c = 0; c < kOwn; ++c) {
    keep[c] = a.norm.scale(channel + c) == Acc(0) ? Acc(0) : Acc(1);
    if constexpr (!kTraining) norms[c] = a.norm.affine(channel + c);
  }

  Accumulated<Acc> statistics;
  Acc above[kOwn][2];  // the row before the pair, of the two columns
  const Element* pixels = tile + strip * 14 * kPixelStride;
  constexpr int kTileRow = kForwardImageColumns * kChannels;

  for (int first_py = py_begin; first_py < py_end; first_py += kPooledRows) {
    barrier();
    // Row r of the convolution after 2 * first_py - 1 reads rows 2r to 2r + 6 of the tile.
    load_image<kForwardImageRows, kForwardImageColumns, 2>(tile, image, p, b, 4 * first_py - 5, 4 * block_px - 6);
    barrier();
    if (first_py == py_begin && first_py > 0) {
      Acc row[kFragments][4] = {};
#pragma unroll
      for (int ky = 0; ky < kSide; ++ky) Mma::accumulate(row, Mma::load_pixels(pixels + ky * kTileRow), weights[ky]);
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) above[c][h] = row[c / 2][c % 2 + 2 * h] * keep[c];
    }
    const int rows = min(kPooledRows, py_end - first_py);
#pragma unroll 1
    for (int r = 0; r < rows; ++r) {
      const int py = first_py + r;
      Acc first[kFragments][4] = {}, second[kFragments][4] = {};
      const Element* row = pixels + (4 * r + 2) * kTileRow;
#pragma unroll
      for (int i = 0; i < kSide + 2; ++i) {
        const typename Mma::Pixels loaded = Mma::load_pixels(row + i * kTileRow);
        if (i < kSide) Mma::accumulate(first, loaded, weights[i]);
        if (i >= 2) Mma::accumulate(second, loaded, weights[i - 2]);
      }
      const bool has_above = py > 0, has_below = 2 * py + 1 < p.conv_height;
      if constexpr (kTraining) statistics.add(first, second, counts, has_below);

      Acc best[kOwn][2];
      unsigned places = 0;  // 2 bits for each of the 8 values
#pragma unroll
      for (int c = 0; c < kOwn; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const Acc middle = first[c / 2][c % 2 + 2 * h] * keep[c], below = second[c / 2][c % 2 + 2 * h] * keep[c];
          unsigned where = has_above ? 0 : 1;
          best[c][h] = has_above ? above[c][h] : middle;
          if (has_above) take<Acc, kIndices>(best[c][h], where, middle, 1);
          if (has_below) take<Acc, kIndices>(best[c][h], where, below, 2);
          above[c][h] = below;
          places |= where << (4 * c + 2 * h);
        }

      // A window's columns lie in neighbouring lanes: an even lane has the left and gets the middle, an odd lane has
      // the middle (of the last 8 columns) and gets the left; both get the right.
      const int next = (column + 1) % 8 * 4 + lane % 4, after = (column + 2) % 8 * 4 + lane % 4;
      unsigned other_places = 0, right_places = 0;
      if constexpr (kIndices) {
        other_places = shuffle_xor(places, 4);
        const unsigned even_right = shuffle(column == 0 ? places >> 2 : places, after);
        const unsigned odd_right = shuffle(places >> 2, next);
        right_places = odd ? odd_right : even_right;
      }
      Pack<typename Mma::Output, kOwn> values;
      Pack<uint8_t, kOwn> indices;
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const Acc other = shuffle_xor(odd ? best[c][0] : best[c][1], 4);
        const Acc even_right = shuffle(column == 0 ? best[c][1] : best[c][0], after);
        const Acc odd_right = shuffle(best[c][1], next);
        const Acc left = odd ? other : best[c][0], middle = odd ? best[c][1] : other;
        const unsigned own_place = places >> (4 * c + (odd ? 2 : 0)) & 3;
        const unsigned other_place = other_places >> (4 * c + (odd ? 2 : 0)) & 3;
        const unsigned left_place = 3 * (odd ? other_place : own_place);
        const unsigned middle_place = 3 * (odd ? own_place : other_place) + 1;
        const unsigned right_place = 3 * (right_places >> (4 * c) & 3) + 2;
        Acc value = has_left ? left : middle;
        unsigned index = has_left ? left_place : middle_place;
        if (has_left) take<Acc, kIndices>(value, index, middle, middle_place);
        if (has_right) take<Acc, kIndices>(value, index, odd ? odd_right : even_right, right_place);
        if constexpr (!kTraining) value = norms[c].apply(value);
        values.value[c] = convert<typename Mma::Output>(value);
        indices.value[c] = uint8_t(index);
      }
      if (writes) {
        const int64_t offset = ((b * p.pooled_height + py) * p.pooled_width + px) * p.out_channels + channel;
        *reinterpret_cast<Pack<typename Mma::Output, kOwn>*>(a.out + offset) = values;
        if constexpr (kIndices) *reinterpret_cast<Pack<uint8_t, kOwn>*>(a.indices + offset) = indices;
      }
    }
  }
  if constexpr (kTraining) {
    const int64_t row = (int64_t(place) * gridDim.y + blockIdx.y) * kStrips + strip;
    statistics.write(a.moments, row, channel, p.out_channels);
  }
}

}  // namespace ceit::i2t
