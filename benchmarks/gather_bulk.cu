// Gather without Triton, to find what limits reads of host memory on a GPU. Same chunk table and lists as
// vllm_hlwq/gather_kernel.py; columns of the table: offset in the record, address in the bank's row 0, bytes from row to
// row, bytes. Plain C interface, loaded through ctypes by gather_bulk.py, so that nothing of torch is compiled.
//
// Variants: 0 vector loads past L1; 1 the same with a 256-byte L2 prefetch hint; 2 bulk asynchronous copies (sm_90).

#include <cstdint>
#include <cuda_runtime.h>

struct Lists {
  int64_t store_address;
  int64_t record_bytes;
  const int64_t* chunk_table;
  int32_t chunks;
  int32_t bank_rows;
  const int32_t* experts;
  const int32_t* rows;
  const int32_t* count;
  int32_t first;
};

struct Piece {
  const char* source;
  char* target;
  int32_t nbytes;
  bool aligned;
};

__device__ __forceinline__ int32_t items_to_copy(const Lists& lists) {
  const int32_t last = min(*lists.count, lists.first + lists.bank_rows);
  return max(last - lists.first, 0) * lists.chunks;
}

__device__ __forceinline__ Piece piece_of(const Lists& lists, int32_t item) {
  const int32_t entry = lists.first + item / lists.chunks;
  const int64_t* chunk = lists.chunk_table + 4 * (item % lists.chunks);
  Piece piece;
  piece.source =
      reinterpret_cast<const char*>(lists.store_address + lists.experts[entry] * lists.record_bytes + chunk[0]);
  piece.target = reinterpret_cast<char*>(chunk[1] + lists.rows[entry] * chunk[2]);
  piece.nbytes = static_cast<int32_t>(chunk[3]);
  piece.aligned = (chunk[1] | chunk[2]) % 16 == 0;
  return piece;
}

__device__ __forceinline__ void copy_bytes(const Piece& piece, int thread, int threads) {
  for (int byte = thread; byte < piece.nbytes; byte += threads) piece.target[byte] = piece.source[byte];
}

template <bool kPrefetch256>
__device__ __forceinline__ uint4 read_once(const void* address) {
  uint4 v;
  if constexpr (kPrefetch256) {
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
  } else {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
  }
  return v;
}

constexpr int kVectorThreads = 256;
constexpr int kReadsInFlight = 8;  // 16 bytes each: 32 KiB under way in a block

template <bool kPrefetch256>
__global__ void __launch_bounds__(kVectorThreads) gather_vector(const Lists lists) {
  const int32_t items = items_to_copy(lists);
  for (int32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const Piece piece = piece_of(lists, item);
    if (!piece.aligned) {
      copy_bytes(piece, threadIdx.x, kVectorThreads);
      continue;
    }
    const int32_t vectors = piece.nbytes / 16;
    for (int32_t start = threadIdx.x; start < vectors; start += kVectorThreads * kReadsInFlight) {
      uint4 data[kReadsInFlight];
#pragma unroll
      for (int i = 0; i < kReadsInFlight; ++i) {
        const int32_t at = start + i * kVectorThreads;
        if (at < vectors) data[i] = read_once<kPrefetch256>(piece.source + 16 * at);
      }
#pragma unroll
      for (int i = 0; i < kReadsInFlight; ++i) {
        const int32_t at = start + i * kVectorThreads;
        if (at < vectors) *reinterpret_cast<uint4*>(piece.target + 16 * at) = data[i];
      }
    }
  }
}

constexpr int kMaxStages = 16;

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void read_into(uint32_t stage, const Piece& piece, uint32_t barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(piece.nbytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(stage),
               "l"(piece.source), "r"(piece.nbytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void write_from(uint32_t stage, const Piece& piece) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(piece.target), "r"(stage),
               "r"(piece.nbytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// Next item from `item` on in steps of the grid whose chunk is aligned, or `items`.
__device__ __forceinline__ int32_t next_aligned(const Lists& lists, int32_t item, int32_t items, Piece& piece) {
  for (; item < items; item += gridDim.x) {
    piece = piece_of(lists, item);
    if (piece.aligned) return item;
  }
  return items;
}
#endif

// One thread keeps a ring of shared-memory stages full: host -> stage -> bank, both ways asynchronous. The second warp
// copies the few chunks that are not 16-byte aligned.
__global__ void __launch_bounds__(64) gather_bulk(const Lists lists, int32_t stage_bytes, int32_t stages) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) uint64_t filled[kMaxStages];
  const int32_t items = items_to_copy(lists);
  if (threadIdx.x >= 32) {
    for (int32_t item = blockIdx.x; item < items; item += gridDim.x) {
      const Piece piece = piece_of(lists, item);
      if (!piece.aligned) copy_bytes(piece, threadIdx.x - 32, 32);
    }
    return;
  }
  if (threadIdx.x != 0) return;

  for (int i = 0; i < stages; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&filled[i])) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");

  // Reads run `stages - 1` chunks ahead of writes, so a stage is read into again only after the write before the latest.
  Piece piece;
  int32_t to_read = next_aligned(lists, blockIdx.x, items, piece);
  int32_t to_write = to_read;
  int32_t reads = 0;
  for (; reads < stages - 1 && to_read < items; ++reads) {
    read_into(shared_address(ring + reads * stage_bytes), piece, shared_address(&filled[reads]));
    to_read = next_aligned(lists, to_read + gridDim.x, items, piece);
  }
  for (int32_t writes = 0; writes < reads; ++writes) {
    if (to_read < items) {
      // The stage was last used by write number `writes - 1`; it must have left shared memory.
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      const int32_t stage = reads % stages;
      read_into(shared_address(ring + stage * stage_bytes), piece, shared_address(&filled[stage]));
      to_read = next_aligned(lists, to_read + gridDim.x, items, piece);
      ++reads;
    }
    const int32_t stage = writes % stages;
    Piece landed;
    to_write = next_aligned(lists, to_write, items, landed);
    wait_for(shared_address(&filled[stage]), writes / stages & 1);
    write_from(shared_address(ring + stage * stage_bytes), landed);
    to_write += gridDim.x;
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

extern "C" const char* gather_launch(int variant, const Lists* lists, int blocks, int stage_bytes, int stages,
                                     cudaStream_t stream) {
  if (variant == 0) {
    gather_vector<false><<<blocks, kVectorThreads, 0, stream>>>(*lists);
  } else if (variant == 1) {
    gather_vector<true><<<blocks, kVectorThreads, 0, stream>>>(*lists);
  } else {
    if (stages < 2 || stages > kMaxStages) return "between 2 and 16 stages are needed";
    const int ring_bytes = stage_bytes * stages;
    cudaError_t raised = cudaFuncSetAttribute(gather_bulk, cudaFuncAttributeMaxDynamicSharedMemorySize, ring_bytes);
    if (raised != cudaSuccess) return cudaGetErrorString(raised);
    gather_bulk<<<blocks, 64, ring_bytes, stream>>>(*lists, stage_bytes, stages);
  }
  const cudaError_t status = cudaGetLastError();
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}
