// A stream, CYCLES beats later: in memory where it is long. What is read from memory, which is slow, goes to a register
// before it goes out.
module delay_line #(
  parameter WIDTH = 1,
  parameter CYCLES = 60
) (
  input wire clk,
  input wire rst,
  input wire advance,
  input wire [WIDTH-1:0] in,
  output reg [WIDTH-1:0] out
);
  generate
    if (CYCLES == 0) begin : none
      wire unused = rst;
      always @(posedge clk) if (advance) out <= in;
    end else if (CYCLES < 8) begin : short
      wire unused = rst;
      wire [WIDTH-1:0] unused_oldest;
      wire [WIDTH*CYCLES-1:0] next;
      reg [WIDTH*CYCLES-1:0] kept;
      assign {unused_oldest, next} = {kept, in};
      always @(posedge clk)
        if (advance) begin
          kept <= next;
          out <= kept[WIDTH*CYCLES-1 -: WIDTH];
        end
    end else begin : long
      localparam BITS = $clog2(CYCLES);
      localparam [BITS-1:0] LAST = CYCLES[BITS-1:0] - 1'b1;
      (* no_rw_check *) reg [WIDTH-1:0] memory [0:CYCLES-1];  // never reads and writes at one place
      reg [WIDTH-1:0] read;
      reg [BITS-1:0] writing, reading;
      always @(posedge clk) begin
        if (rst) begin
          writing <= 0;
          reading <= 1;
        end else if (advance) begin
          writing <= reading;
          reading <= reading == LAST ? 0 : reading + 1'b1;
        end
        if (advance) begin
          read <= memory[reading];
          out <= read;
          memory[writing] <= in;
        end
      end
    end
  endgenerate
endmodule
