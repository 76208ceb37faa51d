// Kernels that do nothing but read: how weights could be streamed. Each adds up all words it reads,
// so that a byte left out or read twice shows. A block of threads takes a run of consecutive tiles,
// as `linear` walks along the columns of its rows.
#pragma once
#include "bench/probes/hopper.cuh"
#include "bench/probes/probe.h"

namespace probes {

constexpr int kLoadThreads = 256;    // read_by_loads
constexpr int kStreamThreads = 128;  // the others
constexpr int kMostStages = 16;
constexpr int kRowPitch = 8192;  // bytes of a row of a row-major matrix: 4096 values of 16 bits
constexpr int kTile = 16384;     // bytes of a tile of read_by_cp_async
constexpr int kAtom = 1024;      // alignment of a swizzled box in shared memory

// What one launch reads, and what tells it from the others of a chain of launches.
struct Piece {
    const char* data;
    int64_t bytes;
    uint32_t* sums;  // [blocks, warps]: what each added up
    // A chain of launches counts itself. A launch that comes too early finds the wrong count.
    int* chain;  // [0]: launches done, [1]: found wrong; nullptr: no chain
    int index;   // of this launch in the chain
};

// Behind wait_for_previous(): the launch before has ended.
__device__ __forceinline__ void follow_chain(const Piece& piece) {
    if (piece.chain == nullptr || threadIdx.x != 0) return;
    const int done = *static_cast<volatile int*>(piece.chain);
    // This launch's first block may have counted it by now.
    if (done < piece.index) atomicAdd(piece.chain + 1, 1);
}

// The last thing a launch does. A launch before has ended, so only the first block's write counts.
__device__ __forceinline__ void extend_chain(const Piece& piece) {
    if (piece.chain == nullptr || threadIdx.x != 0 || blockIdx.x != 0) return;
    *static_cast<volatile int*>(piece.chain) = piece.index + 1;
}

__device__ __forceinline__ uint32_t sum_of(const uint4& v) {
    return v.x + v.y + v.z + v.w;
}

__device__ __forceinline__ void store_sum(const Piece& piece, uint32_t sum) {
    sum = __reduce_add_sync(0xffffffffu, sum);
    const int warps = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) piece.sums[blockIdx.x * warps + threadIdx.x / 32] = sum;
}

// The block's tiles: [first, last) of `count`.
struct Tiles {
    int64_t first, last;
    __device__ explicit Tiles(int64_t count)
        : first(count * blockIdx.x / gridDim.x), last(count * (blockIdx.x + 1) / gridDim.x) {}
};

// Eight loads of 16 bytes a thread under way at once. Bytes: a multiple of 32 KiB.
template <bool kHint>
__global__ void __launch_bounds__(kLoadThreads) read_by_loads(const Piece piece) {
    constexpr int kLoads = 8;
    const uint64_t policy = evict_first();
    const auto* data = reinterpret_cast<const uint4*>(piece.data);
    const Tiles tiles(piece.bytes / (16 * kLoads * kLoadThreads));
    uint32_t sum = 0;
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
        uint4 v[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            v[i] = load_16<kHint>(data + (tile * kLoads + i) * kLoadThreads + threadIdx.x, policy);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) sum += sum_of(v[i]);
    }
    store_sum(piece, sum);
}

// A tile is kRow bytes of each of kTile / kRow rows; with kRow = kTile the matrix is packed, tile
// after tile. Stages of dynamic shared memory: kStages tiles.
template <int kRow, bool kHint, int kStages>
__global__ void __launch_bounds__(kStreamThreads) read_by_cp_async(const Piece piece) {
    unsigned char* const dynamic = specrt::dynamic_shared();
    constexpr int kRows = kTile / kRow, kChunks = kRow / 16, kEach = kTile / 16 / kStreamThreads;
    constexpr int kPitch = kRow == kTile ? kTile : kRowPitch, kAcross = kPitch / kRow;
    const uint64_t policy = evict_first();
    const Tiles tiles(piece.bytes / kTile);
    // This thread's part of the next stage to fill. A pointer that walks and no product with the
    // stage's number: of a uniform offset beside a policy ptxas 13.0 makes an illegal instruction.
    unsigned char* const first = dynamic + threadIdx.x * 16;
    unsigned char* to = first;
    const auto load = [&](int64_t tile) {
        if (tile < tiles.last) {
            const char* from = piece.data + tile / kAcross * kRows * kPitch + tile % kAcross * kRow;
#pragma unroll
            for (int i = 0; i < kEach; ++i) {
                const int chunk = i * kStreamThreads + threadIdx.x;
                cp_async_16<kHint>(to + i * kStreamThreads * 16,
                                   from + chunk / kChunks * kPitch + chunk % kChunks * 16, policy);
            }
        }
        specrt::ptx::cp_async_commit();
        to = to == first + (kStages - 1) * kTile ? first : to + kTile;
    };
    let_next_start();
    for (int i = 0; i < kStages - 1; ++i) load(tiles.first + i);
    wait_for_previous();
    follow_chain(piece);
    uint32_t sum = 0;
    int stage = 0;
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
        // One group a tile, and kStages - 2 behind this one's.
        specrt::ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // it is there for all, and the stage before has been read by all
        load(tile + kStages - 1);
        const auto* words = reinterpret_cast<const uint4*>(dynamic + stage * kTile);
#pragma unroll
        for (int i = 0; i < kEach; ++i) sum += sum_of(words[i * kStreamThreads + threadIdx.x]);
        stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    store_sum(piece, sum);
    extend_chain(piece);
}

// The same by the copy engine. kBox: tiles are boxes of a row-major matrix, 64 values (128 bytes)
// of bytes / 128 rows; else they are consecutive bytes.
struct Stages {
    int bytes, count;
    size_t shared_bytes() const { return static_cast<size_t>(bytes) * count + kAtom; }
};

template <bool kBox, bool kHint>
__device__ __forceinline__ void start_copy(unsigned char* stage, const Piece& piece,
                                           const CUtensorMap* map, int64_t tile, int bytes,
                                           uint64_t* barrier, uint64_t policy) {
    barrier_expect(barrier, bytes);
    if constexpr (kBox) {
        constexpr int kAcross = kRowPitch / 128;
        copy_box<kHint>(stage, map, static_cast<int>(tile % kAcross) * 64,
                        static_cast<int>(tile / kAcross) * (bytes / 128), barrier, policy);
    } else {
        copy_bulk<kHint>(stage, piece.data + tile * bytes, bytes, barrier, policy);
    }
}

template <bool kBox, bool kHint>
__global__ void __launch_bounds__(kStreamThreads)
    read_by_copies(const Piece piece, const Stages stages,
                   const __grid_constant__ CUtensorMap map) {
    unsigned char* const dynamic = specrt::dynamic_shared();
    SPECRT_SHARED(uint64_t[kMostStages], full);
    unsigned char* base = dynamic + (kAtom - shared_address(dynamic) % kAtom) % kAtom;
    const Tiles tiles(piece.bytes / stages.bytes);
    const uint64_t policy = evict_first();
    let_next_start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < stages.count; ++i) barrier_init(&full[i], 1);
        barrier_init_fence();
    }
    __syncthreads();
    const auto load = [&](int64_t tile, int stage) {
        if (threadIdx.x == 0 && tile < tiles.last)
            start_copy<kBox, kHint>(base + stage * stages.bytes, piece, &map, tile, stages.bytes,
                                    &full[stage], policy);
    };
    for (int i = 0; i < stages.count; ++i) load(tiles.first + i, i);
    wait_for_previous();
    follow_chain(piece);
    uint32_t sum = 0, parity = 0;
    int stage = 0;
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
        barrier_wait(&full[stage], parity);
        const auto* words = reinterpret_cast<const uint4*>(base + stage * stages.bytes);
#pragma unroll 4
        for (int i = threadIdx.x; i < stages.bytes / 16; i += kStreamThreads)
            sum += sum_of(words[i]);
        __syncthreads();  // all have read the stage
        load(tile + stages.count, stage);
        if (++stage == stages.count) stage = 0, parity ^= 1;
    }
    store_sum(piece, sum);
    extend_chain(piece);
}

// A map of a row-major matrix of rows of kRowPitch bytes; a box is 64 values of `rows` rows.
CUtensorMap make_map(const char* data, int64_t bytes, int rows,
                     bool has_promotion);  // p3_streams.cu

}  // namespace probes
